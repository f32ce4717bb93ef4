"""Schedules: rows of a function, a trigger, arguments and a state; claiming the due ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, Row, bindparam, func, insert, select, text, update

from llmtasks.errors import ConfigurationError, TaskNotFoundError
from llmtasks.states import ScheduleState
from llmtasks.store.batches import Batch
from llmtasks.store.dialects import by_index, insert_if_new
from llmtasks.store.rows import schedules
from llmtasks.triggers import Cron, Interval, Once, Trigger

#: What instants are counted in.
_TICK: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A stored schedule. ``args``, ``kwargs`` and ``options`` are values, JSON in the database."""

    id: str
    app: str
    name: str
    func_name: str
    #: once, interval or cron, with the columns that it needs.
    kind: str
    expression: str | None = None
    timezone: str | None = None
    every_us: int | None = None
    anchor: datetime | None = None
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    declared_key: str | None = None
    handed: bool = False
    state: ScheduleState = ScheduleState.ACTIVE
    reason: str | None = None
    next_run_at: datetime | None = None
    last_run_at: datetime | None = None
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    #: Runs that its instants got.
    fired: int = 0
    created_at: datetime | None = None
    updated_at: datetime | None = None
    paused_at: datetime | None = None

    @property
    def trigger(self) -> Trigger:
        """The rule that names this schedule's instants.

        Raises:
            ConfigurationError: The row cannot be read as a trigger.
        """
        if self.kind == "cron" and self.expression is not None:
            return Cron(self.expression, self.timezone or "UTC")
        if self.kind == "interval" and self.every_us and self.anchor is not None:
            return Interval(timedelta(microseconds=self.every_us), self.anchor)
        if self.kind == "once" and self.anchor is not None:
            return Once(self.anchor)
        raise ConfigurationError(
            f"schedule {self.id} ({self.name!r}) has no readable trigger: kind {self.kind!r}; save it again"
        )

    @property
    def is_periodic(self) -> bool:
        """Whether another instant may follow each."""
        return self.kind != "once"

    @property
    def runs_left(self) -> int | None:
        """How many more runs ``max_runs`` leaves; None without it."""
        most: int | None = self.options.get("max_runs")
        return None if most is None else max(0, most - self.fired)

    def next_after(self, instant: datetime) -> datetime | None:
        """The first instant after ``instant`` that its start and its end allow."""
        if self.starts_at is not None:
            instant = max(instant, self.starts_at - _TICK)
        found = self.trigger.next_after(instant)
        return None if found is None or (self.ends_at is not None and found > self.ends_at) else found

    def same_trigger(self, other: Schedule) -> bool:
        """Whether both name the same instants, the anchor of an interval aside."""
        mine = (self.kind, self.expression, self.timezone, self.every_us)
        theirs = (other.kind, other.expression, other.timezone, other.every_us)
        return mine == theirs and (self.kind != "once" or self.anchor == other.anchor)


def trigger_columns(trigger: Trigger) -> dict[str, Any]:
    """A trigger as the columns of its row."""
    match trigger:
        case Cron():
            return {
                "kind": "cron",
                "expression": trigger.expression,
                "timezone": trigger.timezone,
                "every_us": None,
                "anchor": None,
            }
        case Interval():
            every = trigger.every // timedelta(microseconds=1)
            return {
                "kind": "interval",
                "expression": None,
                "timezone": None,
                "every_us": every,
                "anchor": trigger.anchor,
            }
        case Once():
            return {"kind": "once", "expression": None, "timezone": None, "every_us": None, "anchor": trigger.at}


_NAMES: Final = schedules.columns.keys()
_DUE: Final = by_index(
    select(schedules)
    .where(schedules.c.app == bindparam("app"), schedules.c.next_run_at <= bindparam("now"))
    .order_by(schedules.c.next_run_at)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True),
    schedules,
    "ix_llmtasks_schedules_due",
)
_NEXT: Final = (
    select(schedules.c.next_run_at)
    .where(schedules.c.app == bindparam("app"), schedules.c.next_run_at.is_not(None))
    .order_by(schedules.c.next_run_at)
    .limit(1)
)
_ADVANCED: Final = ("id", "next_run_at", "last_run_at", "state", "reason", "fired")
_ADVANCE: Final = Batch(
    lambda _, given: (
        update(schedules)
        .where(schedules.c.id == given["id"])
        .values(
            next_run_at=given["next_run_at"],
            last_run_at=func.coalesce(given["last_run_at"], schedules.c.last_run_at),
            state=given["state"],
            reason=given["reason"],
            fired=schedules.c.fired + given["fired"],
        )
    ),
    {name: schedules.c[name].type for name in _ADVANCED},
)


#: Where PostgreSQL tells beats that schedules changed; firing them is no change.
CHANNEL: Final = "llmtasks_schedules"
_NOTIFY: Final = text(f"NOTIFY {CHANNEL}")


def due(tx: Connection, app: str, now: datetime, limit: int) -> list[Row[Any]]:
    """Lock and return up to ``limit`` due rows; those that another beat has locked are passed over."""
    return list(tx.execute(_DUE, {"app": app, "now": now, "limit": limit}))


def next_due(tx: Connection, app: str) -> datetime | None:
    """The earliest next run of an app's schedules."""
    found: datetime | None = tx.execute(_NEXT, {"app": app}).scalar()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """Where a schedule stands after its due instants were dispatched."""

    schedule_id: str
    next_at: datetime | None
    last_at: datetime | None
    to: ScheduleState
    why: str | None
    fired_now: int = 0


def advance(tx: Connection, moves: list[Advance]) -> None:
    """Move schedules on, in the transaction that locked them."""
    rows = [
        {
            "id": item.schedule_id,
            "next_run_at": item.next_at,
            "last_run_at": item.last_at,
            "state": item.to,
            "reason": item.why,
            "fired": item.fired_now,
        }
        for item in moves
    ]
    _ADVANCE.run(tx, rows)


def get(tx: Connection, schedule_id: str, *, lock: bool = False) -> Schedule | None:
    """The schedule with this id."""
    query = select(schedules).where(schedules.c.id == schedule_id)
    row = tx.execute(query.with_for_update() if lock else query).one_or_none()
    return from_row(row) if row else None


def find(
    tx: Connection,
    app: str,
    *,
    name: str | None = None,
    func_name: str | None = None,
    states: Iterable[ScheduleState] = (),
    declared: bool | None = None,
    limit: int | None = None,
) -> list[Schedule]:
    """The schedules of an app, by name."""
    query = select(schedules).where(schedules.c.app == app).order_by(schedules.c.name, schedules.c.created_at)
    if name is not None:
        query = query.where(schedules.c.name == name)
    if func_name is not None:
        query = query.where(schedules.c.func_name == func_name)
    wanted = list(states)
    if wanted:
        query = query.where(schedules.c.state.in_(wanted))
    if declared is not None:
        query = query.where(schedules.c.declared_key.is_not(None) if declared else schedules.c.declared_key.is_(None))
    return [from_row(row) for row in tx.execute(query.limit(limit) if limit is not None else query)]


def get_one(tx: Connection, app: str, id_or_name: str) -> Schedule:
    """The schedule with this id, else the one of the app with this name.

    Raises:
        TaskNotFoundError: There is none, or several share the name.
    """
    found = get(tx, id_or_name)
    named = [] if found else find(tx, app, name=id_or_name)
    if found is None and len(named) > 1:
        ids = ", ".join(f"{item.id} ({item.state})" for item in named)
        raise TaskNotFoundError(f"{len(named)} Tasks are named {id_or_name!r}: name one by its id: {ids}")
    if found is None and not named:
        raise TaskNotFoundError(f"no Task has the id or name {id_or_name!r}; `llmtasks schedules` lists them")
    return found or named[0]


def put(tx: Connection, schedule: Schedule, now: datetime) -> Schedule:
    """Write a schedule as it is, new or changed; returns it with its times.

    Where another process inserts the same declared schedule at the same moment, its row is the one that stays.
    """
    row = _to_row(replace(schedule, created_at=schedule.created_at or now, updated_at=now))
    changed = tx.execute(update(schedules).where(schedules.c.id == schedule.id).values(row)).rowcount
    if not changed:
        tx.execute(insert_if_new(schedules, tx.dialect.name).values(row))
    _tell_beats(tx)
    return from_row(tx.execute(select(schedules).where(schedules.c.id == schedule.id)).one())


def put_many(tx: Connection, new: list[Schedule], now: datetime) -> list[Schedule]:
    """Insert many new schedules; returns them with their times."""
    stamped = [replace(item, created_at=now, updated_at=now) for item in new]
    if stamped:
        tx.execute(insert(schedules), [_to_row(item) for item in stamped])
        _tell_beats(tx)
    return stamped


def _tell_beats(tx: Connection) -> None:
    """Wake beats when the transaction commits; those of other databases look often."""
    if tx.dialect.name == "postgresql":
        tx.execute(_NOTIFY)


def overdue(tx: Connection, app: str, before: datetime) -> int:
    """How many schedules should have fired before then and did not."""
    query = select(func.count()).select_from(schedules).where(schedules.c.app == app, schedules.c.next_run_at < before)
    return tx.execute(query).scalar_one()


def from_row(row: Row[Any]) -> Schedule:
    """A row of the whole table as a Schedule."""
    values = dict(zip(_NAMES, row, strict=True))
    for name in ("args", "kwargs", "options"):
        values[name] = json.loads(values[name])
    values["state"] = ScheduleState(values["state"])
    return Schedule(**values)


def _to_row(schedule: Schedule) -> dict[str, Any]:
    values = {name: getattr(schedule, name) for name in Schedule.__dataclass_fields__}
    for name in ("args", "kwargs", "options"):
        values[name] = json.dumps(values[name], ensure_ascii=False)
    return values
