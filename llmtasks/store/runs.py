"""The ledger: what a run is, how one is opened, read, listed and purged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, and_, bindparam, select, update

from llmtasks.message import RUN, Message
from llmtasks.states import ENDED, RunState
from llmtasks.store import outbox, slots
from llmtasks.store.batches import insertion
from llmtasks.store.rows import runs, values_of
from llmtasks.uniqueness import Unique


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One intended execution as the ledger has it; instants are UTC, durations seconds, memory bytes."""

    id: str
    name: str
    func_name: str
    state: RunState
    reason: str | None
    args: list[Any]
    kwargs: dict[str, Any]
    schedule_id: str | None
    scheduled_for: datetime | None
    queue: str | None
    priority: int
    #: Attempts that ended and count: succeeded, failed, timed out or lost.
    attempts: int
    losses: int
    max_retries: int | None
    next_attempt_at: datetime | None
    worker: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    run_seconds: float | None
    cpu_seconds: float | None
    peak_memory: int | None
    result: Any
    error: str | None
    traceback: str | None
    delivered: bool
    cancel_requested_at: datetime | None
    #: How many missed instants the run stands for, itself included.
    stands_for: int
    #: Whether ``Task.backfill`` opened it.
    backfilled: bool

    @property
    def attempt(self) -> int:
        """The number of the attempt that runs now or ran last: 1, 2, ..."""
        return max(1, self.attempts if self.state in ENDED else self.attempts + 1)

    @property
    def params(self) -> dict[str, Any]:
        """The keyword arguments, under the name that Task uses."""
        return self.kwargs

    @property
    def wait_seconds(self) -> float | None:
        """Seconds from its creation to its first start; None before that."""
        return (self.started_at - self.created_at).total_seconds() if self.started_at else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """What opens a run. ``args`` and ``kwargs`` are JSON texts, ``envelope`` that of what else its message needs."""

    id: str
    app: str
    func_name: str
    name: str
    args: str | None
    kwargs: str | None
    envelope: str | None
    queue: str | None
    priority: int
    schedule_id: str | None = None
    scheduled_for: datetime | None = None
    schedule_slots: int | None = None
    max_retries: int | None = None
    stands_for: int = 1
    backfilled: bool = False
    reason: str | None = None
    #: When its message may be sent; None is at once.
    available_at: datetime | None = None
    #: What no other run may be the same in; the store's ``uniqueness`` asks for it before the run is opened.
    unique: Unique | None = None


#: Fields of a new run that are not columns of its row.
_ASIDE: Final = frozenset({"available_at", "unique"})
_COLUMNS: Final = [runs.c[name] for name in Run.__dataclass_fields__]
_GET: Final = select(*_COLUMNS).where(runs.c.id == bindparam("id"))
_GET_MANY: Final = select(*_COLUMNS).where(runs.c.id.in_(bindparam("ids", expanding=True)))
_OPENED: Final = (
    "id", "app", "func_name", "name", "args", "kwargs", "envelope", "queue", "priority", "schedule_id", "scheduled_for",
    "schedule_slots", "max_retries", "stands_for", "backfilled", "reason", "created_at", "state", "delivered",
    "ended_at",
)  # fmt: skip

#: Leaves an existing row, by id or by instant, as it is.
_INSERT: Final = insertion(runs, _OPENED)


def open_run(tx: Connection, new: NewRun, now: datetime, available_at: datetime | None = None) -> bool:
    """Record a run and leave its message in the outbox; say whether it is new.

    A run with the same id, or of the same instant of the same schedule, is left as it is.

    Args:
        available_at: When its message may be sent; defaults to ``now``.
    """
    opened = _INSERT.run(tx, [_row(new, now, RunState.PENDING)]) == 1
    if opened:
        outbox.put(tx, new.app, [new.id], available_at or now)
    return opened


def open_many(tx: Connection, new: Sequence[NewRun], now: datetime, until: datetime) -> list[Message]:
    """Record runs whose instants nobody else can claim in this transaction, and leave their messages in the outbox.

    An instant that has its run already keeps it, and no second message is left. All are runs of one app.

    Returns:
        The messages that may be sent now, in this order, reserved for the caller until ``until``.
    """
    if not new:
        return []
    app = new[0].app
    opened = _INSERT.run(tx, [_row(item, now, RunState.PENDING) for item in new])
    if opened != len(new):
        unowed = outbox.unowed(tx, [item.id for item in new])
        new = [item for item in new if item.id in unowed]
    later = {item.id: item.available_at for item in new if item.available_at is not None and item.available_at > now}
    outbox.put_new(tx, app, {item.id: later.get(item.id, until) for item in new})
    return [_message(item, until) for item in new if item.id not in later]


def record_ended(tx: Connection, new: NewRun, now: datetime, state: RunState) -> bool:
    """Record a run that ends as it begins (a skipped instant, an entry handed to Celery); say whether it is new."""
    return _INSERT.run(tx, [_row(new, now, state)]) == 1


def record_skipped(tx: Connection, new: Sequence[NewRun], now: datetime) -> None:
    """Record instants that a policy leaves out; one that has its run already keeps it."""
    _INSERT.run(tx, [_row(item, now, RunState.SKIPPED) for item in new])


def record_untold(tx: Connection, new: NewRun, now: datetime, state: RunState) -> None:
    """Record a run that ended before it began and whose end Celery is still to be told."""
    _INSERT.run(tx, [{**_row(new, now, state), "delivered": False}])


def adopt_message(tx: Connection, new: NewRun) -> None:
    """Complete a run that was cancelled before anybody knew it with what its message says."""
    given = {
        name: getattr(new, name) for name in ("func_name", "name", "args", "kwargs", "envelope", "queue", "priority")
    }
    tx.execute(update(runs).where(runs.c.id == new.id, runs.c.func_name == "").values(given))


def end_unheld(
    tx: Connection, run_id: str, now: datetime, state: RunState, reason: str, owner: str | None = None
) -> bool:
    """End a live run that was never begun, or, given its ``owner``, one whose attempt that owner gave up.

    Its slots go to whoever waits.

    Returns:
        Whether the run ended: one that another process holds, or that was begun before, goes on.
    """
    if owner is None:
        ours = and_(runs.c.state.in_([RunState.PENDING, RunState.QUEUED]), runs.c.attempts == 0, runs.c.claim_no == 0)
    else:
        ours = and_(runs.c.state == RunState.RUNNING, runs.c.owner == owner)
    ended = tx.execute(
        update(runs)
        .where(runs.c.id == run_id, ours)
        .values(state=state, reason=reason, ended_at=now, owner=None, next_attempt_at=None)
    ).rowcount
    if not ended:
        return False
    slots.free(tx, run_id, now)
    outbox.remove(tx, [run_id])
    return True


def end_handed(tx: Connection, run_id: str, now: datetime) -> None:
    """End the run of a plain Celery task once its message is with the broker."""
    tx.execute(
        update(runs)
        .where(runs.c.id == run_id, runs.c.state == RunState.QUEUED)
        .values(state=RunState.SKIPPED, reason="handed to Celery", ended_at=now, delivered=True, envelope=None)
    )


def get(tx: Connection, run_id: str) -> Run | None:
    """The run with this id."""
    row = tx.execute(_GET, {"id": run_id}).mappings().one_or_none()
    return _run(row) if row else None


def get_many(tx: Connection, ids: Sequence[str]) -> list[Run]:
    """The runs with these ids, in this order; an id that no run has is left out."""
    rows = tx.execute(_GET_MANY, {"ids": list(ids)}).mappings() if ids else ()
    found = {row["id"]: _run(row) for row in rows}
    return [found[run_id] for run_id in ids if run_id in found]


def find(
    tx: Connection,
    app: str,
    *,
    states: Iterable[RunState] = (),
    func_name: str | None = None,
    schedule_id: str | None = None,
    since: datetime | None = None,
    limit: int = 100,
) -> list[Run]:
    """The latest runs of an app, newest first."""
    query = select(*_COLUMNS).where(runs.c.app == app).order_by(runs.c.created_at.desc()).limit(limit)
    wanted = list(states)
    if wanted:
        query = query.where(runs.c.state.in_(wanted))
    if func_name is not None:
        query = query.where(runs.c.func_name == func_name)
    if schedule_id is not None:
        query = query.where(runs.c.schedule_id == schedule_id)
    if since is not None:
        query = query.where(runs.c.created_at >= since)
    return [_run(row) for row in tx.execute(query).mappings()]


def _row(new: NewRun, now: datetime, state: RunState) -> dict[str, Any]:
    row = {name: getattr(new, name) for name in NewRun.__dataclass_fields__ if name not in _ASIDE}
    ended = state in ENDED
    # An end that needs no telling is delivered from the start; a cancellation waits for the message it belongs to.
    return {
        **row,
        "created_at": now,
        "state": state,
        "delivered": ended and state is not RunState.CANCELLED,
        "ended_at": now if ended else None,
    }


def _message(new: NewRun, until: datetime) -> Message:
    """The message of a run that was just opened: what ``outbox.take_these`` would read."""
    return Message(
        run_id=new.id,
        kind=RUN,
        app=new.app,
        func_name=new.func_name,
        args=new.args,
        kwargs=new.kwargs,
        envelope=new.envelope,
        queue=new.queue,
        priority=new.priority,
        attempts=0,
        replacement=None,
        schedule_id=new.schedule_id,
        reserved_until=until,
    )


def _run(row: RowMapping) -> Run:
    values = values_of(row)
    values["state"] = RunState(values["state"])
    values["args"] = _loads(values["args"], [])
    values["kwargs"] = _loads(values["kwargs"], {})
    values["result"] = _loads(values["result"], None)
    return Run(**values)


def _loads(value: str | None, default: Any) -> Any:
    """JSON that was cut to size is shown as the text that is left of it."""
    if value is None:
        return default
    try:
        return json.loads(value)
    except ValueError:
        return [value] if isinstance(default, list) else {"...": value} if isinstance(default, dict) else value
