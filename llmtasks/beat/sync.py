"""Sync: the schedules that code declares, as rows.

Code owns trigger, arguments and options; the operator owns the state.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from llmtasks.beat.entries import Declared, declared_entries
from llmtasks.changes import first_run, revived, same_instants, within_limits
from llmtasks.dispatch import Station
from llmtasks.options import TaskOptions
from llmtasks.plan import default_zone
from llmtasks.policies import POLICY_NAMES, may_wait
from llmtasks.registry import task_registry
from llmtasks.states import ScheduleState
from llmtasks.store import processes, schedules
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Cron, Interval, Trigger

logger = logging.getLogger(__name__)

#: Why a declared schedule completed; declaring it again makes it active again.
REMOVED: Final = "removed from code"
#: Declared schedules get their ids from this namespace: two beats that start together write the same row.
ID_NAMESPACE: Final = uuid.UUID("0c6f4c1e-8a53-4f0b-8d3e-2f6b7f1c9b54")
LIVE: Final = (ScheduleState.ACTIVE, ScheduleState.PAUSED)


def declared_of(at: Station) -> list[Declared]:
    """Everything that code declares: registered functions, and the app's beat_schedule and periodic tasks."""
    own = [task_registry.options(name) for name in task_registry.names()]
    return [*(_of_options(options) for options in own if options.is_scheduled), *declared_entries(at)]


def write(at: Station, declared: Iterable[Declared]) -> None:
    """Write what code declares: new ones begin, changed ones move, unchanged ones keep their next run."""
    now = at.database.now()
    with at.database.transaction() as tx:
        stored = {row.name: row for row in schedules.find(tx, at.name, declared=True)}
        # In one order: two beats that start together lock the same rows.
        for item in sorted(declared, key=lambda item: item.name):
            before = stored.get(item.name)
            row = _row(at, item, before, now)
            if row == before:
                continue
            # Locked and read again: somebody may have paused it since, or another beat fired it.
            before = schedules.get(tx, row.id, lock=True)
            row = _row(at, item, before, now)
            if row != before:
                schedules.put(tx, row, now)


def complete_removed(at: Station, mine: Collection[str]) -> None:
    """Complete the declared schedules that no live beat of this app declares any more."""
    now = at.database.now()
    with at.database.reading() as connection:
        found = schedules.find(connection, at.name, declared=True, states=LIVE)
        gone = [row for row in found if row.name not in mine]
        if not gone:
            return
        # Read after the rows: a beat says what it declares before it writes rows for it.
        beats = processes.alive(connection, at.name, now - at.settings.lease_time, kind="beat")
    elsewhere = {name for beat in beats for name in beat.declared}
    with at.database.transaction() as tx:
        for row in gone:
            locked = schedules.get(tx, row.id, lock=True)
            if row.name not in elsewhere and locked is not None and locked.state in LIVE:
                logger.info("schedule %r left the code and is completed", row.name)
                over: dict[str, Any] = {"state": ScheduleState.COMPLETED, "next_run_at": None, "paused_at": None}
                schedules.put(tx, replace(locked, reason=REMOVED, **over), now)


def _row(at: Station, item: Declared, before: Schedule | None, now: datetime) -> Schedule:
    """The declaration as a row, with what the row that is there keeps."""
    # What the declaration or the app says is code; where they say nothing, no other host's default moves the row.
    stored_zone = before.timezone if before is not None else None
    zone = item.timezone or at.settings.timezone or stored_zone or default_zone(at)
    trigger = item.trigger(now, str(zone))
    key = f"{at.name}:{item.name}"
    fresh = Schedule(
        id=before.id if before else str(uuid.uuid5(ID_NAMESPACE, key)),
        app=at.name,
        name=item.name,
        func_name=item.func_name,
        args=item.args,
        kwargs=item.kwargs,
        options=item.options,
        declared_key=key,
        handed=item.handed,
        starts_at=item.starts_at,
        ends_at=item.ends_at,
        **trigger_columns(trigger),
    )
    fresh = replace(fresh, next_run_at=first_run(fresh, now))
    return within_limits(fresh if before is None else _kept(before, fresh, now))


def _kept(before: Schedule, fresh: Schedule, now: datetime) -> Schedule:
    """A declared row with what the one that is there keeps."""
    names = ("state", "reason", "paused_at", "last_run_at", "fired", "created_at", "updated_at")
    kept: dict[str, Any] = {name: getattr(before, name) for name in names}
    set_aside = before.state is ScheduleState.ACTIVE and before.next_run_at is None
    if before.state is ScheduleState.COMPLETED and before.reason == REMOVED:
        kept |= {"state": ScheduleState.ACTIVE, "reason": None}
    elif set_aside:
        kept["reason"] = None
    elif (again := revived(before, replace(fresh, **kept), now)) is not None:
        return again
    elif same_instants(before, fresh, now):
        kept |= {"anchor": before.anchor, "next_run_at": before.next_run_at}
    elif before.state is ScheduleState.COMPLETED:
        kept |= {"state": ScheduleState.ACTIVE, "reason": None, "fired": 0}
    elif before.state is not ScheduleState.ACTIVE:
        kept["next_run_at"] = None
    return replace(fresh, **kept)


def _of_options(options: TaskOptions) -> Declared:
    def trigger(now: datetime, zone: str) -> Trigger:
        if options.interval_minutes is not None:
            every = timedelta(minutes=options.interval_minutes)
            later = options.starts_at is not None and options.starts_at > now
            return Interval(every, options.starts_at if options.starts_at and later else now + every)
        assert options.schedule is not None
        return Cron(options.schedule, zone)

    # max_instances, timeout and retries are the function's own: its runs have them already.
    kept = {name: getattr(options, name) for name in (*POLICY_NAMES, "priority", "queue")}
    if may_wait(kept):  # as many of the schedule's runs at once as of the function's
        kept["max_instances"] = options.max_instances
    return Declared(
        name=options.name,
        func_name=options.name,
        trigger=trigger,
        timezone=options.timezone,
        args=[],
        kwargs={},
        options={name: value for name, value in kept.items() if value is not None},
        handed=False,
        starts_at=options.starts_at,
        ends_at=options.ends_at,
    )
