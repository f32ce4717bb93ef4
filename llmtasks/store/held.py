"""What an owner writes about the runs it holds: that it lives, that their ends were delivered, what to remark."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Integer, String, Text, Update, bindparam, case, func, select, update
from sqlalchemy.types import TypeEngine

from llmtasks.states import ENDED, RunState
from llmtasks.store.batches import Batch
from llmtasks.store.claims import OURS
from llmtasks.store.rows import runs, state_in

# Rows are locked in the order of their ids, as everybody does who locks several: no two wait for each other.
_HELD: Final = (
    select(runs.c.id, runs.c.claim_no)
    .where(runs.c.id.in_(bindparam("ids", expanding=True)), runs.c.owner == bindparam("by"))
    .order_by(runs.c.id)
    .with_for_update()
)
_STAMP: Final = (
    update(runs).where(runs.c.id.in_(bindparam("ids", expanding=True))).values(heartbeat_at=bindparam("now"))
)
_REQUESTS: Final = select(runs.c.id, runs.c.claim_no, runs.c.reason).where(
    runs.c.app == bindparam("of_app"),
    runs.c.state == RunState.RUNNING,
    ~runs.c.delivered,
    runs.c.owner == bindparam("by"),
    runs.c.cancel_requested_at.is_not(None),
)


#: What a statement that marks ends as delivered is given.
_GIVEN: Final[dict[str, TypeEngine[Any]]] = {
    "run_id": String(),
    "claim": Integer(),
    "hidden_args": Text(),
    "hidden_kwargs": Text(),
    "keep": Integer(),
}


def _delivered(given: Mapping[str, ColumnElement[Any]]) -> Update:
    """The statement that marks an end, or many, as delivered; long texts are cut to the size that may be kept."""

    def cut(text: ColumnElement[Any]) -> ColumnElement[Any]:
        return case((func.length(text) > given["keep"], func.substr(text, 1, given["keep"])), else_=text)

    return (
        update(runs)
        .where(runs.c.id == given["run_id"], runs.c.claim_no == given["claim"], state_in(ENDED))
        .values(
            delivered=True,
            owner=None,
            envelope=None,
            failure=None,
            args=cut(func.coalesce(given["hidden_args"], runs.c.args)),
            kwargs=cut(func.coalesce(given["hidden_kwargs"], runs.c.kwargs)),
            result=cut(runs.c.result),
            traceback=cut(runs.c.traceback),
        )
    )


_DELIVERED: Final = Batch(lambda _, given: _delivered(given), _GIVEN)
_LET_GO: Final = update(runs).where(OURS, state_in(ENDED)).values(owner=None)
_CALLBACK: Final = update(runs).where(OURS).values(callback_calls=runs.c.callback_calls + 1)
_REMARK: Final = update(runs).where(OURS).values(reason=bindparam("why"))


def stamp(tx: Connection, owner: str, ids: list[str], now: datetime) -> dict[str, int]:
    """Say that an owner holds these runs; returns the claim_no of every one that is still its own, by id."""
    ours = {row.id: row.claim_no for row in tx.execute(_HELD, {"by": owner, "ids": ids})}
    if ours:
        tx.execute(_STAMP, {"ids": list(ours), "now": now})
    return ours


def cancel_requests(tx: Connection, app: str, owner: str) -> dict[str, tuple[int, str]]:
    """Claim numbers and reasons of an owner's running runs that somebody wants cancelled, by id."""
    return {
        row.id: (row.claim_no, row.reason or "cancelled") for row in tx.execute(_REQUESTS, {"by": owner, "of_app": app})
    }


class Delivered(NamedTuple):
    """An end that Celery was told; from now on the ledger keeps only what people read."""

    run_id: str
    claim: int
    #: Characters that each long text is cut to.
    keep: int
    #: Arguments as JSON without what must not stay; None keeps what is there.
    hidden_args: str | None = None
    hidden_kwargs: str | None = None


def mark_delivered(tx: Connection, ends: list[Delivered]) -> None:
    """Celery was told these ends: nobody holds the runs any more, and what sending again needed is dropped."""
    _DELIVERED.run(tx, (item._asdict() for item in sorted(ends, key=lambda item: item.run_id)))


def let_go(tx: Connection, run_id: str, claim_no: int) -> None:
    """Hold an ended run no longer although Celery could not be told; a keeper has it told again."""
    tx.execute(_LET_GO, {"run_id": run_id, "claim": claim_no})


def count_callback(tx: Connection, run_id: str, claim_no: int) -> None:
    """Count a call of on_failure or on_success before it is made, so that a crash in it is seen."""
    tx.execute(_CALLBACK, {"run_id": run_id, "claim": claim_no})


def remark(tx: Connection, run_id: str, claim_no: int, reason: str) -> None:
    """Write down what a person should know about a run of ours."""
    tx.execute(_REMARK, {"run_id": run_id, "claim": claim_no, "why": reason})
