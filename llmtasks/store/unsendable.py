"""What becomes of a run whose message no broker will ever take: it must not hold up the outbox."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from sqlalchemy import Connection, bindparam, select, update

from llmtasks.message import Message
from llmtasks.states import ENDED, RunState
from llmtasks.store import outbox, slots
from llmtasks.store.columns import UtcDateTime
from llmtasks.store.rows import runs, state_in

_ID: Final = runs.c.id == bindparam("run_id")
_LOCK: Final = select(runs.c.id).where(_ID).with_for_update()
_FAIL: Final = (
    update(runs)
    .where(_ID, runs.c.state == RunState.PENDING)
    .values(
        state=RunState.FAILED,
        reason=bindparam("why"),
        error=bindparam("why"),
        failure=bindparam("packed"),
        ended_at=bindparam("now", type_=UtcDateTime()),
        delivered=bindparam("told"),
    )
)
_GIVE_UP: Final = (
    update(runs)
    .where(_ID, state_in(ENDED))
    .values(delivered=True, owner=None, envelope=None, failure=None, replacement=None)
)


def fail(tx: Connection, message: Message, now: datetime, why: str, failure: str, *, told: bool = False) -> list[str]:
    """End a run as failed because its message cannot be sent, and owe the broker nothing for it.

    Args:
        failure: The error, packed as Celery's backends keep it.
        told: Whether nobody needs to be told.

    Returns:
        The ids of the runs that got its slots.
    """
    tx.execute(_LOCK, {"run_id": message.run_id}).all()
    if not outbox.take_back(tx, message):
        return []
    values = {"run_id": message.run_id, "now": now, "why": why, "packed": failure, "told": told}
    if tx.execute(_FAIL, values).rowcount != 1:
        return []
    return slots.free(tx, message.run_id, now)


def give_up_telling(tx: Connection, message: Message) -> None:
    """Tell nobody of a run's end: there is no message that could, or nobody who would hear it."""
    tx.execute(_LOCK, {"run_id": message.run_id}).all()
    outbox.take_back(tx, message)
    tx.execute(_GIVE_UP, {"run_id": message.run_id})
