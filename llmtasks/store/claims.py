"""Claims: taking a run, with its slots. Every write after the claim is fenced by its claim_no."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    update,
)

from llmtasks.states import CLAIMABLE, ENDED, RunState
from llmtasks.store import slots
from llmtasks.store.columns import UtcDateTime
from llmtasks.store.dialects import MARIADB, insert_into, insert_or_lock
from llmtasks.store.lone import Lone
from llmtasks.store.prepared import Prepared
from llmtasks.store.rows import runs, state_in
from llmtasks.store.rows import slots as slot_rows


class Offer(NamedTuple):
    """A message that asks a worker to run something, as the claim needs it; ``args`` to ``envelope`` are JSON texts."""

    id: str
    app: str
    func_name: str
    args: str
    kwargs: str
    envelope: str
    queue: str | None
    priority: int
    #: The message's ``retries``: attempts already ended when it was sent.
    attempts: int
    max_retries: int | None
    retry_delay: float
    function_slots: int | None
    owner: str
    worker: str
    #: When the run was sent, where its message says so.
    created_at: datetime | None = None


class Claim(NamedTuple):
    """A run that this process holds now. ``state`` is running, or final where only its end is to be told."""

    id: str
    claim_no: int
    state: RunState
    name: str
    attempts: int
    max_retries: int | None
    retry_delay: float
    created_at: datetime
    function_slots: int | None
    schedule_slots: int | None = None
    schedule_id: str | None = None
    scheduled_for: datetime | None = None
    callback_calls: int = 0
    reason: str | None = None
    result: str | None = None
    failure: str | None = None
    cancel_requested_at: datetime | None = None

    @property
    def is_slotless(self) -> bool:
        """Whether nothing limits how many such runs there may be at once."""
        return self.function_slots is None and self.schedule_slots is None


_STATE: Final = Claim._fields.index("state")
RETURNED: Final = [runs.c[name] for name in Claim._fields]
_NOW: Final = bindparam("now", type_=UtcDateTime())
#: The row of a run that is not in the ledger yet, taken from the start.
NEW: Final[dict[str, Any]] = {name: bindparam(name, type_=runs.c[name].type) for name in Offer._fields} | {
    "name": bindparam("func_name", type_=runs.c.func_name.type),
    "state": RunState.RUNNING,
    "claim_no": literal_column("1"),
    "heartbeat_at": _NOW,
    "started_at": _NOW,
    "attempt_started_at": _NOW,
    "delivered": False,
}
_STARTABLE: Final = state_in(CLAIMABLE)


def _taking(new: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """What a claim changes in a row that is there, given the ``new`` one.

    MariaDB sets one column after the other: what looks at another one comes before it.
    """
    changes = {
        "claim_no": runs.c.claim_no + 1,
        "started_at": case((_STARTABLE, func.coalesce(runs.c.started_at, new["started_at"])), else_=runs.c.started_at),
        "state": case((_STARTABLE, RunState.RUNNING.value), else_=runs.c.state),
        "owner": new["owner"],
        "worker": new["worker"],
        "heartbeat_at": new["heartbeat_at"],
        "attempt_started_at": new["attempt_started_at"],
        "func_name": new["func_name"],
        "name": case((runs.c.name == "", new["name"]), else_=runs.c.name),
        "args": case((runs.c.envelope.is_(None), new["args"]), else_=runs.c.args),
        "kwargs": case((runs.c.envelope.is_(None), new["kwargs"]), else_=runs.c.kwargs),
        # The message knows the links and the route that the row of a schedule does not.
        "envelope": new["envelope"],
        "queue": func.coalesce(runs.c.queue, new["queue"]),
        "max_retries": func.coalesce(runs.c.max_retries, new["max_retries"]),
        "retry_delay": new["retry_delay"],
        "function_slots": new["function_slots"],
        "replacement": null(),
    }
    return [(runs.c[name], value) for name, value in changes.items()]


def _takeable(new: Mapping[str, Any]) -> ColumnElement[bool]:
    """Whether a run that is in the ledger may be taken."""
    return or_(
        and_(_STARTABLE, new["attempts"] >= runs.c.attempts),
        and_(
            state_in(ENDED),
            ~runs.c.delivered,
            or_(runs.c.owner.is_(None), runs.c.heartbeat_at < bindparam("silent_since", type_=UtcDateTime())),
        ),
    )


# The run by its name: SQLAlchemy correlates nothing inside an INSERT, and would look for any run that holds a slot.
_HOLDS_A_SLOT: Final = exists().where(slot_rows.c.run_id == literal_column(f"{runs.name}.id"))


def takeable_alone(new: Mapping[str, Any]) -> ColumnElement[bool]:
    """Whether it may be taken without a look at slots: it has no limit and holds none."""
    return and_(runs.c.schedule_slots.is_(None), ~_HOLDS_A_SLOT, _takeable(new))


def _claim(dialect: str, condition: Callable[[Any], ColumnElement[bool]]) -> Any:
    """Insert the run, or take it where ``condition`` lets us; no row back means that it is not ours to run."""
    return or_take(insert_into(runs, dialect).values(NEW), condition)


def or_take(statement: Any, condition: Callable[[Any], ColumnElement[bool]]) -> Any:
    """An INSERT of runs that takes those that are there, where ``condition`` lets us, and returns what it got."""
    new = statement.excluded
    return statement.on_conflict_do_update(
        index_elements=["id"], set_=dict(_taking(new)), where=condition(new)
    ).returning(*RETURNED)


def _take(_dialect: str, condition: Callable[[Any], ColumnElement[bool]]) -> Any:
    """Take a run that is in the ledger where ``condition`` lets us."""
    return update(runs).where(runs.c.id == NEW["id"], condition(NEW)).ordered_values(*_taking(NEW))


_CLAIM: Final = Prepared(partial(_claim, condition=_takeable), RETURNED)
_CLAIM_ALONE: Final = Prepared(partial(_claim, condition=takeable_alone), RETURNED)
#: Takes a run that is not in the ledger.
INSERT: Final = Prepared(lambda dialect: insert_into(runs, dialect).values(NEW))
# MariaDB's INSERT has no condition for what it changes: there a claim takes a statement for each step.
_ENSURE: Final = Prepared(
    lambda dialect: insert_or_lock(runs, dialect, "id").values(
        {**NEW, "state": RunState.PENDING, "claim_no": literal_column("0"), "started_at": null()}
    )
)
_TAKE: Final = Prepared(partial(_take, condition=_takeable))
_TAKE_ALONE: Final = Prepared(partial(_take, condition=takeable_alone))
_READ: Final = Prepared(lambda _dialect: select(*RETURNED).where(runs.c.id == NEW["id"]), RETURNED)
#: What every write of a claim is fenced by.
OURS: Final = and_(runs.c.id == bindparam("run_id"), runs.c.claim_no == bindparam("claim"))
_WAIT: Final = (
    update(runs)
    .where(OURS)
    .values(
        state=bindparam("to"), reason=bindparam("why"), owner=None, heartbeat_at=None,
        started_at=case((runs.c.attempts == 0, null()), else_=runs.c.started_at),
        ended_at=bindparam("at"), delivered=bindparam("told"),
    )
)  # fmt: skip


def claim(tx: Connection, offer: Offer, now: datetime, silent_since: datetime) -> Claim | None:
    """Take a run, or its undelivered end; None where it is not ours to take.

    Args:
        silent_since: An owner whose stamp is older than this holds nothing any more.
    """
    values = values_of(offer, now, silent_since)
    if tx.dialect.name not in MARIADB:
        return taken(_CLAIM.one(tx, values))
    _ENSURE.count(tx, values)
    return taken(_READ.one(tx, values)) if _TAKE.count(tx, values) else None


def claim_slotless(lone: Lone | Connection, offer: Offer, now: datetime, silent_since: datetime) -> Claim | None:
    """Take a run that needs no slot, in this one statement; on MariaDB in two or three.

    Alone each of them is good by itself; many such claims may share a transaction.

    Returns:
        None where it is not ours to take, or needs a transaction: its schedule limits it, or it holds a slot.
    """
    if offer.function_slots is not None:
        return None
    values = values_of(offer, now, silent_since)
    if lone.dialect.name not in MARIADB:
        return taken(_CLAIM_ALONE.one(lone, values))
    if not isinstance(lone, Lone):
        _ENSURE.count(lone, values)
        return taken(_READ.one(lone, values)) if _TAKE_ALONE.count(lone, values) else None
    try:
        INSERT.count(lone, values)
    except lone.dialect.loaded_dbapi.IntegrityError:
        if not _TAKE_ALONE.count(lone, values):
            return None
    return taken(_READ.one(lone, values))


def values_of(offer: Offer, now: datetime, silent_since: datetime) -> dict[str, Any]:
    """What a claiming statement is given."""
    values = offer._asdict()
    values["created_at"] = min(offer.created_at or now, now)  # senders' clocks may be ahead
    return values | {"now": now, "silent_since": silent_since}


def taken(row: list[Any] | None) -> Claim | None:
    """The claim that a row of ``RETURNED`` is."""
    if row is None:
        return None
    row[_STATE] = RunState(row[_STATE])
    return Claim._make(row)


def take_slots(tx: Connection, app: str, func_name: str, claim: Claim, now: datetime) -> str | None:
    """Take the slots of a run just claimed.

    Returns:
        None when the run may start, else the reason why it does not.
    """
    wanted = slots.scopes(app, func_name, claim.function_slots, claim.schedule_id, claim.schedule_slots)
    if not wanted:
        if claim.claim_no > 1:
            # It may have been handed a slot while it waited, by code that still had a limit.
            slots.free(tx, claim.id, now)
        return None
    full = slots.take(tx, wanted, claim.id, now)
    if full is None:
        return None
    places = dict(wanted)[full]
    owner = f"function {func_name!r}" if full.startswith("function:") else f"schedule {claim.name!r}"
    return f"all {places} slots of {owner} were taken" if places > 1 else f"the only slot of {owner} was taken"


def put_aside(tx: Connection, claim: Claim, state: RunState, reason: str, now: datetime) -> None:
    """Leave a run just claimed as ``waiting``, or end it as ``skipped``, of which nobody needs to be told."""
    ended = state in ENDED
    tx.execute(
        _WAIT,
        {
            "run_id": claim.id,
            "claim": claim.claim_no,
            "to": state,
            "why": reason,
            "at": now if ended else None,
            "told": ended,
        },
    )
