"""Overlaps: the unfinished runs of schedules, as beat's policies need them: one question for a whole batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, and_, func, or_, select

from llmtasks.states import LIVE, RunState
from llmtasks.store.cancelling import cancel_where
from llmtasks.store.dialects import PerDialect, among
from llmtasks.store.rows import runs, state_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """What a schedule has not finished: how many runs, and the oldest of them."""

    count: int
    run_id: str
    state: RunState
    scheduled_for: datetime | None


def _counted(schedule_ids: ColumnElement[bool]) -> ColumnElement[bool]:
    """Pending, queued, waiting, running and retrying runs, those by hand too, backfilled ones not."""
    # The first two terms are the index's own condition.
    return and_(schedule_ids, ~runs.c.delivered, ~runs.c.backfilled, state_in(LIVE))


def _oldest(dialect: str) -> Select[Any]:
    of_schedule = func.count().over(partition_by=runs.c.schedule_id)
    age = func.row_number().over(partition_by=runs.c.schedule_id, order_by=[runs.c.created_at, runs.c.id])
    numbered = (
        select(
            runs.c.schedule_id,
            runs.c.id,
            runs.c.state,
            runs.c.scheduled_for,
            of_schedule.label("many"),
            age.label("age"),
        )
        .where(_counted(among(runs.c.schedule_id, "ids", dialect)))
        .subquery()
    )
    return select(numbered).where(numbered.c.age == 1)


_OLDEST: Final = PerDialect(_oldest)


def unfinished(tx: Connection, schedule_ids: Collection[str]) -> dict[str, Unfinished]:
    """What these schedules have not finished, by their ids; one that has nothing is not there."""
    if not schedule_ids:
        return {}
    return {
        row.schedule_id: Unfinished(
            count=row.many, run_id=row.id, state=RunState(row.state), scheduled_for=row.scheduled_for
        )
        for row in tx.execute(_OLDEST[tx.dialect.name], {"ids": list(schedule_ids)})
    }


def cancel_unfinished(
    tx: Connection, reasons: Mapping[str, str], now: datetime, replaced: Mapping[str, str] | None = None
) -> list[str]:
    """Cancel what these schedules have not finished, each for its own reason; returns the runs' ids.

    Args:
        replaced: Reasons for other runs, by their ids: together, because everybody locks runs in one order.
    """
    replaced = replaced or {}
    if not reasons and not replaced:
        return []
    wanted = or_(_counted(runs.c.schedule_id.in_(list(reasons))), runs.c.id.in_(list(replaced)))
    return cancel_where(tx, wanted, now, {**reasons, **replaced})
