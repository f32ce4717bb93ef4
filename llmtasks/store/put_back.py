"""After the database's clock was put back: times that are past and now lie ahead, so that nothing waits for them twice.

Every function here may be repeated, by any number of keepers at once.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, and_, exists, func, or_, select, update

from llmtasks.states import RunState, ScheduleState
from llmtasks.store.rows import outbox, processes, runs, schedules
from llmtasks.store.schedules import Schedule, from_row, put

#: Schedules that one transaction looks at.
BATCH: Final = 200


def newest(tx: Connection, app: str) -> datetime | None:
    """When the newest run of an app was made: ahead of the clock only where that was put back."""
    found: datetime | None = tx.execute(select(func.max(runs.c.created_at)).where(runs.c.app == app)).scalar()
    return found


def forget_the_lost_time(tx: Connection, app: str, before: datetime, patience: timedelta, now: datetime) -> None:
    """Let what happened in the time that comes again have happened now, and what was to follow it follow now.

    Leases run from now on, delays between attempts keep their length, messages that were due or reserved are due.

    Args:
        before: What the clock showed when it was put back.
        patience: How long a message is reserved at most.
    """
    open_runs = and_(runs.c.app == app, ~runs.c.delivered)
    retrying = select(runs.c.id, runs.c.heartbeat_at, runs.c.next_attempt_at).where(
        open_runs, runs.c.state == RunState.RETRYING, runs.c.heartbeat_at > now
    )
    for row in tx.execute(retrying.order_by(runs.c.id).with_for_update(skip_locked=True)).all():
        follows = now + (row.next_attempt_at - row.heartbeat_at)
        tx.execute(update(runs).where(runs.c.id == row.id).values(heartbeat_at=now, next_attempt_at=follows))
    for column in (runs.c.heartbeat_at, runs.c.published_at, runs.c.delivery_sent_at):
        late = select(runs.c.id).where(open_runs, runs.c.state != RunState.RETRYING, column > now)
        ids = tx.execute(late.order_by(runs.c.id).with_for_update(skip_locked=True)).scalars().all()
        for run_id in ids:
            tx.execute(update(runs).where(runs.c.id == run_id).values({column: now}))
    # A first message that was asked for at a later time, after the step, keeps it.
    known_before = exists().where(
        runs.c.id == outbox.c.run_id, or_(runs.c.created_at > now, runs.c.publications > 0, runs.c.attempts > 0)
    )
    owed = (
        select(outbox.c.run_id)
        .where(outbox.c.app == app, outbox.c.available_at > now, outbox.c.available_at <= before + patience)
        .where(known_before)
        .order_by(outbox.c.run_id)
        .with_for_update(skip_locked=True)
    )
    for run_id in tx.execute(owed).scalars().all():
        tx.execute(update(outbox).where(outbox.c.run_id == run_id).values(available_at=now))
    tx.execute(update(processes).where(processes.c.app == app, processes.c.heartbeat_at > now).values(heartbeat_at=now))


def begin_grids_anew(tx: Connection, app: str, after: str, now: datetime) -> tuple[str | None, int]:
    """Let intervals that would wait for the lost time begin a new grid now: no instant of the old one runs twice.

    Cron expressions and one-offs name times of the clock, which come when it shows them.

    Args:
        after: The id that the last call returned; empty at first.

    Returns:
        The id to go on after, None at the end, and how many began anew.
    """
    rows = tx.execute(
        select(schedules)
        .where(
            schedules.c.app == app,
            schedules.c.id > after,
            schedules.c.kind == "interval",
            schedules.c.next_run_at > now,
            or_(schedules.c.last_run_at > now, schedules.c.updated_at > now),
        )
        .order_by(schedules.c.id)
        .limit(BATCH)
        .with_for_update()
    ).all()
    anew = [renewed for renewed in (_anew(from_row(row), now) for row in rows) if renewed is not None]
    for schedule in anew:
        put(tx, schedule, now)
    return (rows[-1].id if len(rows) == BATCH else None), len(anew)


def _anew(schedule: Schedule, now: datetime) -> Schedule | None:
    """The schedule on a grid from now on; None where what it waits for is not the lost time."""
    every = timedelta(microseconds=schedule.every_us or 0)
    since = max(filter(None, (schedule.last_run_at, schedule.updated_at)))
    following = schedule.next_run_at
    if schedule.state is not ScheduleState.ACTIVE or following is None or not now + every < following <= since + every:
        return None  # it comes within an interval, or somebody asked for this time
    moved = replace(schedule, anchor=now)
    return replace(moved, next_run_at=moved.next_after(now))
