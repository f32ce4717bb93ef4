"""What stands between a run and its start or end: reading only, for ``llmtasks why``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, and_, func, or_, select

from llmtasks.states import RunState
from llmtasks.store.rows import outbox, runs, slots, values_of
from llmtasks.store.runs import Run, get


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is written about a run beside what ``Run`` has; ``available_at`` is None where nothing is in the outbox."""

    app: str
    function_slots: int | None
    schedule_slots: int | None
    owner: str | None
    heartbeat_at: datetime | None
    attempt_started_at: datetime | None
    published_at: datetime | None
    publications: int
    delivery_sent_at: datetime | None
    available_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who has a slot, and since when."""

    run_id: str
    name: str | None
    worker: str | None
    state: RunState | None
    taken_at: datetime


_STANDING: Final = tuple(
    outbox.c[name] if name == "available_at" else runs.c[name] for name in Standing.__dataclass_fields__
)


def standing(tx: Connection, run_id: str) -> Standing:
    """The standing of a run that exists."""
    query = select(*_STANDING).select_from(runs.outerjoin(outbox, outbox.c.run_id == runs.c.id))
    return Standing(**values_of(tx.execute(query.where(runs.c.id == run_id)).mappings().one()))


def holders(tx: Connection, scope: str) -> list[Holder]:
    """The runs that have the slots of a scope, by place."""
    rows = tx.execute(
        select(slots.c.run_id, slots.c.taken_at, runs.c.name, runs.c.worker, runs.c.state)
        .select_from(slots.outerjoin(runs, runs.c.id == slots.c.run_id))
        .where(slots.c.scope == scope)
        .order_by(slots.c.place)
    )
    return [
        Holder(
            run_id=row.run_id,
            name=row.name,
            worker=row.worker,
            state=RunState(row.state) if row.state else None,
            taken_at=row.taken_at,
        )
        for row in rows
    ]


def before_in_line(tx: Connection, app: str, run: Run, scope: str) -> int:
    """How many waiting runs get a slot of ``scope`` before this one: by priority, then by age."""
    first = or_(
        runs.c.priority < run.priority,
        and_(runs.c.priority == run.priority, runs.c.created_at < run.created_at),
        and_(runs.c.priority == run.priority, runs.c.created_at == run.created_at, runs.c.id < run.id),
    )
    kind, _, _ = scope.partition(":")
    same = (
        runs.c.schedule_id == run.schedule_id
        if kind == "schedule"
        else and_(runs.c.func_name == run.func_name, runs.c.function_slots.is_not(None))
    )
    query = (
        select(func.count())
        .select_from(runs)
        .where(runs.c.app == app, ~runs.c.delivered, runs.c.state == RunState.WAITING, same, first)
    )
    return tx.execute(query).scalar_one()


def last_instant(tx: Connection, schedule_id: str) -> Run | None:
    """The run of a schedule's latest instant, skipped or not."""
    query = (
        select(runs.c.id)
        .where(runs.c.schedule_id == schedule_id, runs.c.scheduled_for.is_not(None))
        .order_by(runs.c.scheduled_for.desc())
        .limit(1)
    )
    found = tx.execute(query).scalar()
    return None if found is None else get(tx, found)
