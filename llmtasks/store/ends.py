"""Ends: how an attempt ended, written under its claim."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Float,
    Integer,
    String,
    Text,
    Update,
    and_,
    case,
    func,
    null,
    or_,
    update,
)
from sqlalchemy.types import TypeEngine

from llmtasks.states import ENDED, RunState
from llmtasks.store import outbox, slots
from llmtasks.store.batches import Given, bound
from llmtasks.store.claims import Claim
from llmtasks.store.columns import UtcDateTime
from llmtasks.store.lone import Lone
from llmtasks.store.prepared import Prepared
from llmtasks.store.rows import runs


class End(NamedTuple):
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


#: What a statement that ends attempts is given, and how; see ``values_of``.
GIVEN: Final[dict[str, TypeEngine[Any]]] = {
    "run_id": String(),
    "claim": Integer(),
    "to": String(),
    "counted": Integer(),
    "keeps": Boolean(),
    "now": UtcDateTime(),
    "told": Boolean(),
    "ended": UtcDateTime(),
    "why": Text(),
    "value": Text(),
    "line": Text(),
    "packed": Text(),
    "trace": Text(),
    "again_at": UtcDateTime(),
    "wall": Float(),
    "cpu": Float(),
    "peak": BigInteger(),
    "new_args": Text(),
    "new_kwargs": Text(),
    "instead": Text(),
}


#: What ``ending_for_good`` is given of them.
GIVEN_FOR_GOOD: Final = {
    name: GIVEN[name]
    for name in (
        "run_id", "claim", "to", "counted", "keeps", "now", "told", "why", "value", "line", "packed", "trace",
        "wall", "cpu", "peak",
    )
}  # fmt: skip


def ending(given: Given) -> Update:
    """The statement that ends an attempt, or many: under its claim, and while it runs."""
    to, now = given["to"], given["now"]
    # Somebody asked to cancel the run: it has no next attempt.
    given_up = and_(
        runs.c.cancel_requested_at.is_not(None),
        or_(*(to == state.value for state in (RunState.RETRYING, RunState.QUEUED, RunState.PENDING))),
    )
    # Another function takes the run's place, from its first attempt on; it brings its own message.
    replaced = and_(given["instead"].is_not(None), ~given_up)
    return _ours_that_run(given).values(
        {
            **_outcome(given),
            "state": case((given_up, RunState.CANCELLED.value), else_=to),
            "attempts": case((replaced, 0), else_=runs.c.attempts + given["counted"]),
            "max_retries": case((replaced, null()), else_=runs.c.max_retries),
            # Back in its queue: from now on it may be missed there.
            "published_at": case((to == RunState.QUEUED.value, now), else_=runs.c.published_at),
            "ended_at": case((given_up, now), else_=given["ended"]),
            "reason": case((given_up, runs.c.reason), else_=given["why"]),
            "next_attempt_at": case((given_up, null()), else_=given["again_at"]),
            "args": func.coalesce(given["new_args"], runs.c.args),
            "kwargs": func.coalesce(given["new_kwargs"], runs.c.kwargs),
            "envelope": case((replaced, null()), else_=runs.c.envelope),
            "replacement": case((replaced, given["instead"]), else_=null()),
        }
    )


def ending_for_good(given: Given) -> Update:
    """The same where the run is over (``is_for_good``): SQLite takes two fifths of the time for it."""
    return _ours_that_run(given).values(_outcome(given))


def _ours_that_run(given: Given) -> Update:
    return update(runs).where(
        runs.c.id == given["run_id"], runs.c.claim_no == given["claim"], runs.c.state == RunState.RUNNING
    )


def _outcome(given: Given) -> dict[str, Any]:
    """What an attempt changes that is its run's last."""
    return {
        "state": given["to"],
        "attempts": runs.c.attempts + given["counted"],
        "owner": case((given["keeps"], runs.c.owner), else_=null()),
        "heartbeat_at": given["now"],
        "ended_at": given["now"],
        "delivered": given["told"],
        "reason": given["why"],
        "result": given["value"],
        "error": given["line"],
        "failure": given["packed"],
        "traceback": given["trace"],
        "next_attempt_at": null(),
        "run_seconds": given["wall"],
        "cpu_seconds": given["cpu"],
        "peak_memory": given["peak"],
    }


_END: Final = Prepared(lambda _dialect: ending(bound(GIVEN)))
_END_FOR_GOOD: Final = Prepared(lambda _dialect: ending_for_good(bound(GIVEN_FOR_GOOD)))


def end(tx: Connection, claim: Claim, how: End, now: datetime) -> tuple[bool, list[str]]:
    """End the attempt of a claim; its slots go to whoever waits first, what takes its place goes to the outbox.

    Returns:
        Whether the run was still ours, and the ids of the runs that got its slots.
    """
    if not end_lone(tx, claim, how, now):
        return False, []
    if how.replacement is not None:
        outbox.put_pending(tx, claim.id, now)
    if claim.is_slotless:
        return True, []
    return True, slots.free(tx, claim.id, now)


def is_lone(claim: Claim, how: End) -> bool:
    """Whether the end of the attempt is nothing but its row: ``end_lone`` can write it."""
    return claim.is_slotless and how.replacement is None


def end_lone(lone: Lone | Connection, claim: Claim, how: End, now: datetime) -> bool:
    """End the attempt of a claim in this one statement; says whether the run was still ours."""
    statement = _END_FOR_GOOD if is_for_good(how) else _END
    return statement.count(lone, values_of(claim, how, now)) == 1


def is_for_good(how: End) -> bool:
    """Whether the run is over with this attempt, as it was."""
    return how.state in ENDED and how.replacement is None and how.args is None and how.kwargs is None


def values_of(claim: Claim, how: End, now: datetime) -> dict[str, Any]:
    """What ``ending`` is given for one attempt."""
    return {
        "run_id": claim.id,
        "claim": claim.claim_no,
        "to": how.state,
        "counted": int(how.counts),
        "keeps": how.keeps_owner,
        "now": now,
        "told": how.delivered,
        "ended": now if how.state in ENDED else None,
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


def _storable(text: str | None) -> str | None:
    """``text`` as every database takes it: an error's message may hold NUL, or halves of UTF-16 pairs."""
    return None if text is None else text.encode(errors="backslashreplace").decode().replace("\0", "\\0")
