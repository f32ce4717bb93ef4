"""Cancelling runs: at once what nobody holds, by a request to the owner what runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Final

from sqlalchemy import ColumnElement, Connection, select, update

from llmtasks.states import ENDED, RunState
from llmtasks.store import outbox, slots
from llmtasks.store.rows import runs
from llmtasks.store.runs import NewRun, Run, get, record_ended

#: Ids in one statement; databases refuse some ten thousands of parameters.
SLICE: Final = 1_000


def cancel(tx: Connection, app: str, run_id: str, now: datetime, reason: str) -> Run | None:
    """Cancel a run: at once where nothing holds it, by a request to its owner where one does.

    An id that is not known yet is stored as cancelled, so that its message, when it comes, does not start.

    Returns:
        The run afterwards; None where the id was unknown.
    """
    if get(tx, run_id) is None:
        unknown = NewRun(
            id=run_id, app=app, func_name="", name="", args="[]", kwargs="{}", envelope="{}", queue=None, priority=5,
            reason=reason,
        )  # fmt: skip
        if record_ended(tx, unknown, now, RunState.CANCELLED):
            return None
    cancel_where(tx, runs.c.id == run_id, now, reason)
    return get(tx, run_id)


def cancel_of_schedule(tx: Connection, schedule_id: str, now: datetime, reason: str) -> list[str]:
    """Cancel every unfinished run of a schedule; returns their ids."""
    return cancel_where(tx, runs.c.schedule_id == schedule_id, now, reason)


def cancel_where(
    tx: Connection, condition: ColumnElement[bool], now: datetime, reason: str | Mapping[str, str]
) -> list[str]:
    """Cancel the unstarted runs that meet ``condition``, request it for the running ones; returns the ids of both.

    Args:
        reason: Why; one for all, or one for each run or each schedule by its id.
    """
    live = select(runs.c.id, runs.c.state, runs.c.schedule_id).where(condition, runs.c.state.not_in(ENDED))
    # Locked before either is written: a run that starts or retries in between would be missed by both.
    found = tx.execute(live.order_by(runs.c.id).with_for_update()).all()
    unstarted, running = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for row in found:
        why = reason if isinstance(reason, str) else reason.get(row.id) or reason[row.schedule_id]
        (running if row.state == RunState.RUNNING else unstarted)[why].append(row.id)
    for why, ids in _slices(unstarted):
        tx.execute(
            update(runs)
            .where(runs.c.id.in_(ids))
            .values(
                state=RunState.CANCELLED,
                reason=why,
                ended_at=now,
                owner=None,
                cancel_requested_at=now,
                next_attempt_at=None,
            )
        )
        outbox.remove(tx, ids)
    if unstarted:
        slots.free_all(tx, [run_id for ids in unstarted.values() for run_id in ids], now)
    for why, ids in _slices(running):
        tx.execute(
            update(runs)
            .where(runs.c.id.in_(ids), runs.c.cancel_requested_at.is_(None))
            .values(cancel_requested_at=now, reason=why)
        )
    return [row.id for row in found]


def _slices(found: Mapping[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Each reason with its ids, in parts that a statement can name one by one."""
    for why, ids in found.items():
        for begin in range(0, len(ids), SLICE):
            yield why, ids[begin : begin + SLICE]
