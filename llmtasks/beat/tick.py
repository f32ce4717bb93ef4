"""One tick: claim what is due, record its runs, move the schedules on, all in one transaction; then send."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from llmtasks.dispatch import Station, run_of
from llmtasks.errors import LLMTasksError
from llmtasks.message import Message
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
#: What instants are counted in.
_TICK: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """What one due schedule leads to."""

    new: list[NewRun]
    skipped: list[NewRun]
    advance: Advance


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """What one tick took. ``messages`` are to be sent by the caller, who has them reserved."""

    count: int
    messages: list[Message]
    #: The earliest next run of the app's schedules.
    following: datetime | None

    def pause(self, now: datetime) -> float:
        """Seconds until the next schedule is due."""
        return math.inf if self.following is None else max(0.0, (self.following - now).total_seconds())


def claim_due(at: Station, limit: int = BATCH) -> Claimed:
    """Claim due schedules and record their runs.

    Raises:
        DatabaseUnavailableError: Nothing was claimed.
    """
    now = at.database.now()
    with at.database.reading() as connection:
        following = schedules.next_due(connection, at.name)
    if following is None or following > now:
        return Claimed(count=0, messages=[], following=following)
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
        following = schedules.next_due(tx, at.name)
    return Claimed(count=len(rows), messages=messages, following=following)


def _firing_of(row: Any, now: datetime) -> Firing:
    """What a due row leads to; a row that cannot be read or run is set aside with its reason."""
    try:
        schedule = schedules.from_row(row)
        if not schedule.handed and schedule.func_name not in task_registry:
            raise LLMTasksError(f"no task function is registered as {schedule.func_name!r} where beat runs")
        return fire(schedule, now)
    except Exception as error:
        known = isinstance(error, LLMTasksError)
        logger.error("schedule %s (%r) is set aside: %s", row.id, row.name, error, exc_info=not known)
        why = f"set aside: {error}"
        move = Advance(schedule_id=row.id, next_at=None, last_at=None, to=ScheduleState(row.state), why=why)
        return Firing(new=[], skipped=[], advance=move)


def fire(schedule: Schedule, now: datetime) -> Firing:
    """The runs of a due schedule's instants up to ``now`` by its misfire policy, and where it stands afterwards.

    Pure. Of several instants that are due at once only the latest can be on time, and it is within ``misfire_grace``.
    """
    trigger, first, ends_at = schedule.trigger, schedule.next_run_at, schedule.ends_at
    assert first is not None
    until = now if ends_at is None else min(now, ends_at)
    if first > until:
        return Firing(new=[], skipped=[], advance=_advance(schedule, None, None, "it reached its end"))
    before = first - _TICK
    latest, count = latest_at_or_before(trigger, before, until)
    if latest is None:
        # The row's time is none of its trigger's instants: somebody asked for it, and it stands for itself.
        latest, count = first, 1
    new, skipped = _by_policy(schedule, before, latest, count, now)
    following = trigger.next_after(max(latest, now))
    over = None
    if following is None:
        over = "it fired" if new else "its instant was missed"
    elif ends_at is not None and following > ends_at:
        following, over = None, "it reached its end"
    return Firing(new=new, skipped=skipped, advance=_advance(schedule, following, latest, over))


def _advance(schedule: Schedule, next_at: datetime | None, last_at: datetime | None, over: str | None) -> Advance:
    to = ScheduleState.ACTIVE if over is None else ScheduleState.COMPLETED
    return Advance(schedule_id=schedule.id, next_at=next_at, last_at=last_at, to=to, why=over)


def _by_policy(
    schedule: Schedule, before: datetime, latest: datetime, count: int, now: datetime
) -> tuple[list[NewRun], list[NewRun]]:
    policy = Misfire(schedule.options.get("misfire") or Misfire.ONCE)
    grace = schedule.options.get("misfire_grace")
    missed = now - latest > timedelta(seconds=DEFAULT_MISFIRE_GRACE if grace is None else grace)
    if policy is Misfire.SKIP:
        if missed:
            return [], [_skipped(schedule, latest, count, now)]
        return [run_of(schedule, scheduled_for=latest)], _earlier(schedule, before, latest, now)
    if policy is Misfire.ALL and count > 1:
        instants = latest_instants(schedule.trigger, before, latest, ALL_LIMIT)
        runs_of_all = [run_of(schedule, scheduled_for=item, reason=_late(now - item)) for item in instants[:-1]]
        runs_of_all.append(run_of(schedule, scheduled_for=latest, reason=_late(now - latest) if missed else None))
        return runs_of_all, _earlier(schedule, before, instants[0], now)
    reason = _late(now - latest) if missed else None
    if count > 1:
        reason = f"stands for {count} instants that nobody could dispatch in time"
    return [run_of(schedule, scheduled_for=latest, stands_for=count, reason=reason)], []


def _earlier(schedule: Schedule, before: datetime, instant: datetime, now: datetime) -> list[NewRun]:
    """The trace of the instants after ``before`` and before ``instant``, none of which runs."""
    latest, count = latest_at_or_before(schedule.trigger, before, instant - _TICK)
    return [] if latest is None else [_skipped(schedule, latest, count, now)]


def _skipped(schedule: Schedule, instant: datetime, count: int, now: datetime) -> NewRun:
    policy = schedule.options.get("misfire")
    what = f"{count} instants missed, the latest" if count > 1 else "1 instant missed,"
    reason = f"misfire policy {policy}: {what} {_late(now - instant)}"
    return run_of(schedule, scheduled_for=instant, stands_for=count, reason=reason)


def _late(late: timedelta) -> str:
    return f"{late.total_seconds():.0f} s late"
