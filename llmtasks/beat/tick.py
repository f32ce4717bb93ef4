"""One tick: claim what is due, record its runs, move the schedules on, all in one transaction; then send."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from llmtasks.dispatch import Station, run_of
from llmtasks.errors import LLMTasksError
from llmtasks.options import DEFAULT_MISFIRE_GRACE, Misfire
from llmtasks.registry import task_registry
from llmtasks.states import RunState, ScheduleState
from llmtasks.store import outbox, runs, schedules
from llmtasks.store.runs import NewRun
from llmtasks.store.schedules import Advance, Schedule
from llmtasks.triggers import latest_at_or_before, latest_instants

logger = logging.getLogger(__name__)

#: Schedules that one transaction claims at most.
BATCH: Final = 500
#: Instants that misfire "all" runs at most.
ALL_LIMIT: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """What one due schedule leads to."""

    new: list[NewRun]
    skipped: list[NewRun]
    advance: Advance


def claim_due(at: Station, limit: int = BATCH) -> tuple[int, list[outbox.Message]]:
    """Claim due schedules and record their runs.

    Returns:
        How many schedules were due, and the messages to send, reserved for the caller.

    Raises:
        DatabaseUnavailableError: Nothing was claimed.
    """
    now = at.database.now()
    with at.database.reading() as connection:
        following = schedules.next_due(connection, at.name)
    if following is None or following > now:
        return 0, []
    with at.database.transaction() as tx:
        rows = schedules.due(tx, at.name, now, limit)
        firings = [_firing_of(row, now) for row in rows]
        new = [item for firing in firings for item in firing.new]
        runs.open_many(tx, new, now)
        for firing in firings:
            for item in firing.skipped:
                runs.record_ended(tx, item, now, RunState.SKIPPED)
        schedules.advance(tx, [firing.advance for firing in firings])
        until = now + timedelta(seconds=at.settings.outbox_patience)
        messages = outbox.take_these(tx, [item.id for item in new], until) if new else []
    return len(rows), messages


def next_due(at: Station) -> datetime | None:
    """The earliest next run of the app's schedules."""
    with at.database.reading() as connection:
        return schedules.next_due(connection, at.name)


def _firing_of(row: Any, now: datetime) -> Firing:
    """What a due row leads to; a row that cannot be read or run is set aside with its reason."""
    try:
        schedule = schedules.from_row(row)
        if not schedule.handed and schedule.func_name not in task_registry:
            raise LLMTasksError(f"no task function is registered as {schedule.func_name!r} where beat runs")
        return fire(schedule, now)
    except Exception as error:
        logger.exception("schedule %s (%r) is set aside until it is saved again", row.id, row.name)
        why = f"set aside: {error}"
        move = Advance(schedule_id=row.id, next_at=None, last_at=None, to=ScheduleState(row.state), why=why)
        return Firing(new=[], skipped=[], advance=move)


def fire(schedule: Schedule, now: datetime) -> Firing:
    """The runs of a due schedule's instants up to ``now`` by its misfire policy, and where it stands afterwards.

    Pure: an instant within ``misfire_grace`` is on time; of several that are due at once all but the latest are missed.
    """
    trigger, first = schedule.trigger, schedule.next_run_at
    assert first is not None
    until = min(now, schedule.ends_at) if schedule.ends_at else now
    before = first - timedelta(microseconds=1)
    latest, count = latest_at_or_before(trigger, before, until)
    if latest is None:
        # The row's time is none of its trigger's instants, such as a first run that was asked for: it stands for itself.
        latest, count = first, 1
    new, skipped = _by_policy(schedule, before, latest, count, now)
    following = trigger.next_after(max(latest, now))
    over = following is None or (schedule.ends_at is not None and following > schedule.ends_at)
    move = Advance(
        schedule_id=schedule.id,
        next_at=None if over else following,
        last_at=latest,
        to=ScheduleState.COMPLETED if over else ScheduleState.ACTIVE,
        why="it fired" if over and schedule.kind == "once" else "it reached its end" if over else None,
    )
    return Firing(new=new, skipped=skipped, advance=move)


def _by_policy(
    schedule: Schedule, before: datetime, latest: datetime, count: int, now: datetime
) -> tuple[list[NewRun], list[NewRun]]:
    policy = Misfire(schedule.options.get("misfire") or Misfire.ONCE)
    grace = schedule.options.get("misfire_grace")
    late = now - latest
    missed = late > timedelta(seconds=DEFAULT_MISFIRE_GRACE if grace is None else grace)
    if policy is Misfire.ALL and count > 1:
        instants = latest_instants(schedule.trigger, before, latest, ALL_LIMIT)
        return [
            run_of(schedule, scheduled_for=item, reason=_late(now - item) if item != latest or missed else None)
            for item in instants
        ], []
    if policy is Misfire.SKIP:
        if missed:
            return [], [_skipped(schedule, latest, count, late)]
        earlier = [] if count == 1 else [_skipped(schedule, _previous(schedule, before, latest), count - 1, late)]
        return [run_of(schedule, scheduled_for=latest)], earlier
    reason = _late(late) if missed else None
    if count > 1:
        reason = f"stands for {count} instants that nobody could dispatch in time"
    return [run_of(schedule, scheduled_for=latest, stands_for=count, reason=reason)], []


def _skipped(schedule: Schedule, instant: datetime, count: int, late: timedelta) -> NewRun:
    return run_of(
        schedule,
        scheduled_for=instant,
        stands_for=count,
        reason=f"misfire policy skip: {count} instant{'s' if count > 1 else ''} missed, the latest {_late(late)}",
    )


def _previous(schedule: Schedule, before: datetime, latest: datetime) -> datetime:
    found, _ = latest_at_or_before(schedule.trigger, before, latest - timedelta(microseconds=1))
    assert found is not None  # count said that there is one
    return found


def _late(late: timedelta) -> str:
    return f"{late.total_seconds():.0f} s late"
