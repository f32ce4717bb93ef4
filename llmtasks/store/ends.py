"""Ends: how an attempt ended, written under its claim."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Text, and_, bindparam, case, func, null, or_, update

from llmtasks.states import ENDED, RunState
from llmtasks.store import outbox, slots
from llmtasks.store.claims import OURS, Claim
from llmtasks.store.columns import UtcDateTime
from llmtasks.store.lone import Lone
from llmtasks.store.prepared import Prepared
from llmtasks.store.rows import runs


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


#: Somebody asked to cancel the run: it has no next attempt.
_GIVEN_UP: Final = and_(
    runs.c.cancel_requested_at.is_not(None),
    or_(*(bindparam("to") == state.value for state in (RunState.RETRYING, RunState.QUEUED, RunState.PENDING))),
)
#: Another function takes the run's place, from its first attempt on; it brings its own message.
_REPLACED: Final = and_(bindparam("instead", type_=Text()).is_not(None), ~_GIVEN_UP)
_ENDING: Final = (
    update(runs)
    .where(OURS, runs.c.state == RunState.RUNNING)
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


def end(tx: Connection, claim: Claim, how: End, now: datetime) -> tuple[bool, list[str]]:
    """End the attempt of a claim; its slots go to whoever waits first, what takes its place goes to the outbox.

    Returns:
        Whether the run was still ours, and the ids of the runs that got its slots.
    """
    if _END.count(tx, _values(claim, how, now)) != 1:
        return False, []
    if how.replacement is not None:
        outbox.put_pending(tx, claim.id, now)
    if claim.is_slotless:
        return True, []
    return True, slots.free(tx, claim.id, now)


def is_lone(claim: Claim, how: End) -> bool:
    """Whether the end of the attempt is nothing but its row: ``end_lone`` can write it."""
    return claim.is_slotless and how.replacement is None


def end_lone(lone: Lone, claim: Claim, how: End, now: datetime) -> bool:
    """End the attempt of a claim in this one statement; says whether the run was still ours."""
    return _END.count(lone, _values(claim, how, now)) == 1


def _values(claim: Claim, how: End, now: datetime) -> dict[str, Any]:
    return {
        "run_id": claim.id,
        "claim": claim.claim_no,
        "to": how.state,
        "counted": int(how.counts),
        "keeps": int(how.keeps_owner),
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
