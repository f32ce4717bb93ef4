"""Claims: taking a run and ending its attempt. Every write after the claim is fenced by its claim_no."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Text, and_, bindparam, case, func, literal_column, null, or_, update

from llmtasks.states import CLAIMABLE, ENDED, RunState
from llmtasks.store import outbox, slots
from llmtasks.store.prepared import Prepared
from llmtasks.store.rows import UtcDateTime, insert_into, runs, state_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A run that this process holds now. ``state`` is running, or final where only its end is to be told."""

    id: str
    claim_no: int
    state: RunState
    name: str
    attempts: int
    max_retries: int | None
    retry_delay: float
    schedule_id: str | None
    scheduled_for: datetime | None
    function_slots: int | None
    schedule_slots: int | None
    callback_calls: int
    reason: str | None
    result: str | None
    failure: str | None
    cancel_requested_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How an attempt ended; ``result`` and ``failure`` are JSON texts."""

    state: RunState
    #: Whether it counts as one of the run's attempts.
    counts: bool = True
    #: Whether the worker keeps the run until its end is delivered.
    keeps_owner: bool = False
    delivered: bool = False
    reason: str | None = None
    result: str | None = None
    error: str | None = None
    failure: str | None = None
    traceback: str | None = None
    next_attempt_at: datetime | None = None
    run_seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory: int | None = None
    args: str | None = None
    kwargs: str | None = None
    replacement: str | None = None


_RETURNED: Final = [runs.c[name] for name in Claim.__dataclass_fields__]


def _claim(dialect: str) -> Any:
    """Insert the run or take it; no row back means that it is not ours to run.

    Taken is what is claimable and not superseded by a later attempt, and an end that nobody holds and Celery was not
    told.
    """
    names = [*Offer.__dataclass_fields__]
    statement = insert_into(runs, dialect).values(
        {name: bindparam(name) for name in names}
        | {
            "name": bindparam("func_name"),
            "state": RunState.RUNNING,
            "claim_no": literal_column("1"),
            "heartbeat_at": bindparam("now"),
            "started_at": bindparam("now"),
            "attempt_started_at": bindparam("now"),
            "delivered": False,
        }
    )
    new = statement.excluded
    startable = state_in(CLAIMABLE)
    return statement.on_conflict_do_update(
        index_elements=["id"],
        set_={
            "claim_no": runs.c.claim_no + 1,
            "state": case((startable, RunState.RUNNING.value), else_=runs.c.state),
            "owner": new.owner,
            "worker": new.worker,
            "heartbeat_at": new.heartbeat_at,
            "started_at": case((startable, func.coalesce(runs.c.started_at, new.started_at)), else_=runs.c.started_at),
            "attempt_started_at": new.attempt_started_at,
            "func_name": new.func_name,
            "name": case((runs.c.name == "", new.name), else_=runs.c.name),
            "args": case((runs.c.envelope.is_(None), new.args), else_=runs.c.args),
            "kwargs": case((runs.c.envelope.is_(None), new.kwargs), else_=runs.c.kwargs),
            # The message knows the links and the route that the row of a schedule does not.
            "envelope": new.envelope,
            "queue": func.coalesce(runs.c.queue, new.queue),
            "max_retries": func.coalesce(runs.c.max_retries, new.max_retries),
            "retry_delay": new.retry_delay,
            "function_slots": new.function_slots,
            "replacement": null(),
        },
        where=or_(
            and_(startable, new.attempts >= runs.c.attempts),
            and_(
                state_in(ENDED),
                ~runs.c.delivered,
                or_(runs.c.owner.is_(None), runs.c.heartbeat_at < bindparam("silent_since", type_=UtcDateTime())),
            ),
        ),
    ).returning(*_RETURNED)


_CLAIM: Final = Prepared(_claim, _RETURNED)
_OURS: Final = and_(runs.c.id == bindparam("run_id"), runs.c.claim_no == bindparam("claim"))
#: Somebody asked to cancel the run: it has no next attempt.
_GIVEN_UP: Final = and_(
    runs.c.cancel_requested_at.is_not(None),
    or_(*(bindparam("to") == state.value for state in (RunState.RETRYING, RunState.QUEUED, RunState.PENDING))),
)
#: Another function takes the run's place, from its first attempt on; it brings its own message.
_REPLACED: Final = and_(bindparam("instead", type_=Text()).is_not(None), ~_GIVEN_UP)
_WAIT: Final = (
    update(runs)
    .where(_OURS)
    .values(
        state=bindparam("to"), reason=bindparam("why"), owner=None, heartbeat_at=None,
        started_at=case((runs.c.attempts == 0, null()), else_=runs.c.started_at),
        ended_at=bindparam("at"), delivered=bindparam("told"),
    )
)  # fmt: skip
_ENDING: Final = (
    update(runs)
    .where(_OURS, runs.c.state == RunState.RUNNING)
    .values(
        state=case((_GIVEN_UP, RunState.CANCELLED.value), else_=bindparam("to")),
        attempts=case((_REPLACED, 0), else_=runs.c.attempts + bindparam("counted")),
        max_retries=case((_REPLACED, null()), else_=runs.c.max_retries),
        owner=case((bindparam("keeps") == 1, runs.c.owner), else_=null()),
        heartbeat_at=bindparam("now"),
        delivered=bindparam("told"),
        # Back in its queue: from now on it may be missed there.
        published_at=case(
            (bindparam("to") == RunState.QUEUED.value, bindparam("now", type_=UtcDateTime())),
            else_=runs.c.published_at,
        ),
        ended_at=case(
            (_GIVEN_UP, bindparam("now", type_=UtcDateTime())), else_=bindparam("ended", type_=UtcDateTime())
        ),
        reason=case((_GIVEN_UP, runs.c.reason), else_=bindparam("why", type_=Text())),
        result=bindparam("value"),
        error=bindparam("line"),
        failure=bindparam("packed"),
        traceback=bindparam("trace"),
        next_attempt_at=case((_GIVEN_UP, null()), else_=bindparam("again_at", type_=UtcDateTime())),
        run_seconds=bindparam("wall"),
        cpu_seconds=bindparam("cpu"),
        peak_memory=bindparam("peak"),
        args=func.coalesce(bindparam("new_args", type_=Text()), runs.c.args),
        kwargs=func.coalesce(bindparam("new_kwargs", type_=Text()), runs.c.kwargs),
        envelope=case((_REPLACED, null()), else_=runs.c.envelope),
        replacement=case((_REPLACED, bindparam("instead", type_=Text())), else_=null()),
    )
)
_END: Final = Prepared(lambda _dialect: _ENDING)


def claim(tx: Connection, offer: Offer, now: datetime, silent_since: datetime) -> Claim | None:
    """Take a run, or its undelivered end; None where it is not ours to take.

    Args:
        silent_since: An owner whose stamp is older than this holds nothing any more.
    """
    values = {name: getattr(offer, name) for name in Offer.__dataclass_fields__}
    values["created_at"] = offer.created_at or now
    values |= {"now": now, "silent_since": silent_since}
    row = _CLAIM.one(tx, values)
    if row is None:
        return None
    found = dict(zip(Claim.__dataclass_fields__, row, strict=True))
    found["state"] = RunState(found["state"])
    return Claim(**found)


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


def end(tx: Connection, claim: Claim, how: End, now: datetime) -> tuple[bool, list[str]]:
    """End the attempt of a claim; its slots go to whoever waits first, what takes its place goes to the outbox.

    Returns:
        Whether the run was still ours, and the ids of the runs that got its slots.
    """
    ended = how.state in ENDED
    values = {
        "run_id": claim.id,
        "claim": claim.claim_no,
        "to": how.state,
        "counted": int(how.counts),
        "keeps": int(how.keeps_owner),
        "now": now,
        "told": how.delivered,
        "ended": now if ended else None,
        "why": _storable(how.reason),
        "value": how.result,
        "line": _storable(how.error),
        "packed": how.failure,
        "trace": _storable(how.traceback),
        "again_at": how.next_attempt_at,
        "wall": how.run_seconds,
        "cpu": how.cpu_seconds,
        "peak": how.peak_memory,
        "new_args": how.args,
        "new_kwargs": how.kwargs,
        "instead": how.replacement,
    }
    if _END.count(tx, values) != 1:
        return False, []
    if how.replacement is not None:
        outbox.put_pending(tx, claim.id, now)
    if claim.function_slots is None and claim.schedule_slots is None:
        return True, []
    return True, slots.free(tx, claim.id, now)


def _storable(text: str | None) -> str | None:
    """``text`` as every database takes it: an error's message may hold NUL, or halves of UTF-16 pairs."""
    return None if text is None else text.encode(errors="backslashreplace").decode().replace("\0", "\\0")
