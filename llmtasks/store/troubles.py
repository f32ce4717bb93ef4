"""What in the rows will not go on by itself: reading only, for ``llmtasks doctor``."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from llmtasks.states import ENDED, RunState, ScheduleState
from llmtasks.store.rows import runs, schedules


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """A task function that active schedules fire. ``handed``: it is a plain Celery task of the app's own."""

    func_name: str
    handed: bool
    schedules: int
    #: The name of one of them.
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """A schedule that beat could not fire, and why."""

    id: str
    name: str
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """Runs of one function that the broker has; their queue is None where the function or a route decides."""

    queue: str | None
    func_name: str
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Untold:
    """Ends that Celery was not told although they were sent again and again."""

    count: int
    #: The id of one of those runs.
    example: str
    #: How often that one's end was sent.
    times: int


def fired(tx: Connection, app: str) -> list[Fired]:
    """The task functions that an app's schedules will fire."""
    rows = tx.execute(
        select(schedules.c.func_name, schedules.c.handed, func.count(), func.min(schedules.c.name))
        .where(schedules.c.app == app, schedules.c.next_run_at.is_not(None))
        .group_by(schedules.c.func_name, schedules.c.handed)
        .order_by(schedules.c.func_name)
    )
    return [Fired(func_name=name, handed=handed, schedules=count, example=some) for name, handed, count, some in rows]


def set_aside(tx: Connection, app: str, limit: int) -> list[SetAside]:
    """The first schedules, by name, that are active and will not fire."""
    rows = tx.execute(
        select(schedules.c.id, schedules.c.name, schedules.c.reason)
        .where(schedules.c.app == app, schedules.c.state == ScheduleState.ACTIVE, schedules.c.next_run_at.is_(None))
        .order_by(schedules.c.name, schedules.c.id)
        .limit(limit)
    )
    return [SetAside(id=row.id, name=row.name, reason=row.reason) for row in rows]


def queued(tx: Connection, app: str) -> list[Queued]:
    """The runs that the broker has."""
    rows = tx.execute(
        select(runs.c.queue, runs.c.func_name, func.count().label("queued"))
        .where(runs.c.app == app, ~runs.c.delivered, runs.c.state == RunState.QUEUED)
        .group_by(runs.c.queue, runs.c.func_name)
        .order_by(runs.c.queue, runs.c.func_name)
    )
    return [Queued(queue=row.queue, func_name=row.func_name, runs=row.queued) for row in rows]


def untold(tx: Connection, app: str, times: int) -> Untold | None:
    """The ends that were sent at least ``times`` times and have not reached Celery."""
    many = (
        runs.c.app == app, ~runs.c.delivered, runs.c.state.in_(ENDED), runs.c.delivery_sent_at.is_not(None),
        runs.c.publications >= times,
    )  # fmt: skip
    count = tx.execute(select(func.count()).select_from(runs).where(*many)).scalar_one()
    if not count:
        return None
    first = tx.execute(select(runs.c.id, runs.c.publications).where(*many).order_by(runs.c.ended_at).limit(1)).one()
    return Untold(count=count, example=first.id, times=first.publications)
