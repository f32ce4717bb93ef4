"""What an owner writes about the runs it holds: that it lives, that their ends were delivered, what to remark."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Integer, Text, bindparam, case, func, select, update

from llmtasks.states import ENDED, RunState
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


def _cut(text: Any) -> Any:
    """``text``, cut to the size that a delivered run may keep."""
    keep = bindparam("keep", type_=Integer())
    return case((func.length(text) > keep, func.substr(text, 1, keep)), else_=text)


_DELIVERED: Final = (
    update(runs)
    .where(OURS, state_in(ENDED))
    .values(
        delivered=True,
        owner=None,
        envelope=None,
        failure=None,
        args=_cut(func.coalesce(bindparam("hidden_args", type_=Text()), runs.c.args)),
        kwargs=_cut(func.coalesce(bindparam("hidden_kwargs", type_=Text()), runs.c.kwargs)),
        result=_cut(runs.c.result),
        traceback=_cut(runs.c.traceback),
    )
)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """An end that Celery was told; from now on the ledger keeps only what people read."""

    run_id: str
    claim: int
    #: Arguments as JSON without what must not stay; None keeps what is there.
    hidden_args: str | None = None
    hidden_kwargs: str | None = None
    #: Characters that each long text is cut to.
    keep: int


def mark_delivered(tx: Connection, ends: list[Delivered]) -> None:
    """Celery was told these ends: nobody holds the runs any more, and what sending again needed is dropped."""
    names = Delivered.__dataclass_fields__
    if ends:
        in_order = sorted(ends, key=lambda item: item.run_id)
        tx.execute(_DELIVERED, [{name: getattr(item, name) for name in names} for item in in_order])


def let_go(tx: Connection, run_id: str, claim_no: int) -> None:
    """Hold an ended run no longer although Celery could not be told; a keeper has it told again."""
    tx.execute(_LET_GO, {"run_id": run_id, "claim": claim_no})


def count_callback(tx: Connection, run_id: str, claim_no: int) -> None:
    """Count a call of on_failure or on_success before it is made, so that a crash in it is seen."""
    tx.execute(_CALLBACK, {"run_id": run_id, "claim": claim_no})


def remark(tx: Connection, run_id: str, claim_no: int, reason: str) -> None:
    """Write down what a person should know about a run of ours."""
    tx.execute(_REMARK, {"run_id": run_id, "claim": claim_no, "why": reason})
