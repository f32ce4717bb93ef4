"""Uncovered instants: those of a schedule for which nothing ran, not even elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, or_, select

from llmtasks.states import RunState
from llmtasks.store.rows import runs
from llmtasks.store.runs import NewRun

#: A policy left the instant out: at dispatch, so that nothing was sent, or at the claim, for want of a place. Not so
#: what expired or was handed to Celery.
_LEFT_OUT: Final[ColumnElement[bool]] = and_(
    runs.c.state == RunState.SKIPPED,
    runs.c.attempts == 0,
    runs.c.started_at.is_(None),
    or_(runs.c.publications == 0, runs.c.claim_no > 0),
)
_BETWEEN: Final = and_(
    runs.c.schedule_id == bindparam("of_schedule"),
    runs.c.scheduled_for >= bindparam("first"),
    runs.c.scheduled_for <= bindparam("last"),
)
_COVERED: Final = select(runs.c.scheduled_for).where(_BETWEEN, ~_LEFT_OUT)
_SKIPPED: Final = select(runs.c.scheduled_for, runs.c.reason).where(_BETWEEN, _LEFT_OUT)
_FORGET: Final = delete(runs).where(runs.c.id.in_(bindparam("ids", expanding=True)), _LEFT_OUT)


def covered(tx: Connection, schedule_id: str, first: datetime, last: datetime) -> set[datetime]:
    """The instants of a schedule from ``first`` to ``last`` that have their run, ended or not."""
    return set(tx.execute(_COVERED, {"of_schedule": schedule_id, "first": first, "last": last}).scalars())


def skipped(tx: Connection, schedule_id: str, first: datetime, last: datetime) -> dict[datetime, str | None]:
    """The instants from ``first`` to ``last`` that a policy left out, with their reasons."""
    found = tx.execute(_SKIPPED, {"of_schedule": schedule_id, "first": first, "last": last})
    return {row.scheduled_for: row.reason for row in found}


def forget(tx: Connection, new: Sequence[NewRun]) -> None:
    """Remove the traces of left out instants, whose runs are opened in this transaction after all."""
    if new:
        tx.execute(_FORGET, {"ids": [item.id for item in new]})
