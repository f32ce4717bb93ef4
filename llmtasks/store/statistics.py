"""What the ledger says of many runs at once. Reading only: a few grouped statements and one bounded sample.

Counted are the runs that ended since an instant, and those that are live now, whenever they began.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Connection, Row, bindparam, case, func, select
from sqlalchemy.sql.elements import ColumnElement

from llmtasks.states import ENDED, LIVE, RunState, ScheduleState
from llmtasks.store.columns import UtcDateTime
from llmtasks.store.rows import runs, schedules


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How many runs of a task function are in one state."""

    func_name: str
    state: RunState
    runs: int
    #: Attempts after the first.
    retries: int
    #: Attempts that were lost with their worker.
    losses: int
    #: Of the last attempts together, and how many of them were timed.
    run_seconds: float
    timed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Seconds over a number of runs; None where there are none."""

    count: int = 0
    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution:
        """The distribution of ``values``; percentiles between two values are interpolated linearly."""
        ordered = sorted(values)
        if not ordered:
            return cls()
        p50, p95, p99 = (_percentile(ordered, share) for share in (0.50, 0.95, 0.99))
        return cls(count=len(ordered), mean=sum(ordered) / len(ordered), p50=p50, p95=p95, p99=p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long runs waited for their first start, and how long their last attempts took."""

    wait: Distribution
    run_time: Distribution


#: The numbers of a ``Count``.
MEASURES: Final = ("runs", "retries", "losses", "run_seconds", "timed")
_SUMS: Final = (
    runs.c.func_name,
    runs.c.state,
    func.count().label("runs"),
    func.sum(case((runs.c.attempts > 1, runs.c.attempts - 1), else_=0)).label("retries"),
    func.sum(runs.c.losses).label("losses"),
    func.coalesce(func.sum(runs.c.run_seconds), 0.0).label("run_seconds"),
    func.count(runs.c.run_seconds).label("timed"),
)
_OF_APP: Final = runs.c.app == bindparam("of_app")
_OF_FUNCTION: Final = runs.c.func_name == bindparam("of_func")
_ENDED_SINCE: Final = runs.c.ended_at >= bindparam("since", type_=UtcDateTime())
_ENDED_BEFORE: Final = runs.c.ended_at < bindparam("before", type_=UtcDateTime())
#: After every end.
_NEVER: Final = datetime(9999, 1, 1, tzinfo=UTC)


def _both(*conditions: ColumnElement[bool]) -> tuple[Any, Any]:
    """The grouped statement for all task functions, and for one."""
    query = select(*_SUMS).where(_OF_APP, *conditions).group_by(runs.c.func_name, runs.c.state)
    return query, query.where(_OF_FUNCTION)


_ENDED: Final = _both(_ENDED_SINCE, _ENDED_BEFORE, runs.c.state.in_(ENDED))
# The condition on delivered is implied by LIVE; it lets the database use the small index of what is open.
_LIVE: Final = _both(~runs.c.delivered, runs.c.state.in_(LIVE))
_LATEST: Final = (
    select(runs.c.created_at, runs.c.started_at, runs.c.run_seconds)
    .where(_OF_APP, _ENDED_SINCE, runs.c.state.in_([RunState.SUCCEEDED, RunState.FAILED]))
    .order_by(runs.c.ended_at.desc())
    .limit(bindparam("at_most"))
)
_LATEST_OF: Final = _LATEST.where(_OF_FUNCTION)
_SILENT: Final = (
    select(func.count())
    .select_from(runs)
    .where(
        _OF_APP,
        ~runs.c.delivered,
        runs.c.state == RunState.RUNNING,
        runs.c.heartbeat_at < bindparam("silent_since", type_=UtcDateTime()),
    )
)
_SILENT_OF: Final = _SILENT.where(_OF_FUNCTION)
_LAST: Final = (
    select(runs.c.id).where(runs.c.schedule_id == bindparam("schedule")).order_by(runs.c.created_at.desc()).limit(1)
)


def ended(
    tx: Connection, app: str, since: datetime, before: datetime = _NEVER, func_name: str | None = None
) -> list[Count]:
    """The runs that ended at ``since`` or later, and before ``before``, by task function and state."""
    return _counts(tx, _ENDED, {"of_app": app, "since": since, "before": before}, func_name)


def live(tx: Connection, app: str, func_name: str | None = None) -> list[Count]:
    """The runs that have not ended, by task function and state."""
    return _counts(tx, _LIVE, {"of_app": app}, func_name)


def latest(tx: Connection, app: str, since: datetime, func_name: str | None, limit: int) -> Times:
    """The times of the last ``limit`` runs that succeeded or failed at ``since`` or later.

    A run that was recorded by its first start (``.delay()``) has both instants equal: its wait is not known.
    """
    values: dict[str, Any] = {"of_app": app, "since": since, "at_most": limit}
    if func_name is not None:
        values["of_func"] = func_name
    rows = tx.execute(_LATEST if func_name is None else _LATEST_OF, values).all()
    return Times(
        wait=Distribution.of(
            (started - created).total_seconds() for created, started, _ in rows if started and started > created
        ),
        run_time=Distribution.of(seconds for _, _, seconds in rows if seconds is not None),
    )


def silent(tx: Connection, app: str, since: datetime, func_name: str | None = None) -> int:
    """How many running runs have not been stamped since then."""
    values: dict[str, Any] = {"of_app": app, "silent_since": since}
    if func_name is not None:
        values["of_func"] = func_name
    return tx.execute(_SILENT if func_name is None else _SILENT_OF, values).scalar_one()


def schedules_by_state(tx: Connection, app: str, func_name: str | None = None) -> dict[ScheduleState, int]:
    """How many schedules are in each state."""
    query = select(schedules.c.state, func.count()).where(schedules.c.app == app).group_by(schedules.c.state)
    if func_name is not None:
        query = query.where(schedules.c.func_name == func_name)
    return {ScheduleState(state): count for state, count in tx.execute(query)}


def overdue(tx: Connection, app: str, before: datetime, func_name: str | None = None) -> int:
    """How many schedules should have fired before then and did not."""
    query = select(func.count()).select_from(schedules).where(schedules.c.app == app, schedules.c.next_run_at < before)
    if func_name is not None:
        query = query.where(schedules.c.func_name == func_name)
    return tx.execute(query).scalar_one()


def last_run_id(tx: Connection, schedule_id: str) -> str | None:
    """The id of a schedule's newest run, by hand or by its trigger."""
    return tx.execute(_LAST, {"schedule": schedule_id}).scalar()


def _counts(tx: Connection, queries: tuple[Any, Any], values: dict[str, Any], func_name: str | None) -> list[Count]:
    if func_name is not None:
        values = {**values, "of_func": func_name}
    return counts_of(tx.execute(queries[0] if func_name is None else queries[1], values))


def counts_of(rows: Iterable[Row[Any]]) -> list[Count]:
    """Rows of grouped sums as counts; a sum of integers is a Decimal where the database widens it."""
    return [
        Count(
            func_name=row.func_name,
            state=RunState(row.state),
            runs=int(row.runs),
            retries=int(row.retries),
            losses=int(row.losses),
            run_seconds=float(row.run_seconds),
            timed=int(row.timed),
        )
        for row in rows
    ]


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
