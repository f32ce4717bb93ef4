"""Sync: the schedules that code declares, as rows. Code owns trigger, arguments and options; the operator owns the state."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from celery.schedules import crontab
from celery.schedules import schedule as celery_schedule

from llmtasks.dispatch import Station
from llmtasks.errors import ConfigurationError, DuplicateTaskError, InvalidTriggerError
from llmtasks.options import TaskOptions
from llmtasks.registry import task_registry
from llmtasks.states import ScheduleState
from llmtasks.store import processes, schedules
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.task import default_zone
from llmtasks.triggers import Cron, Interval, Trigger

logger = logging.getLogger(__name__)

#: Why a declared schedule completed; declaring it again makes it active again.
REMOVED = "removed from code"


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A schedule as code declares it. The trigger may need the present and the zone in use before."""

    name: str
    func_name: str
    trigger: Callable[[datetime, str], Trigger]
    #: The zone that the declaration names; None leaves it to the app, and to what is stored.
    timezone: str | None
    args: list[Any]
    kwargs: dict[str, Any]
    options: dict[str, Any]
    handed: bool


def declared_of(at: Station) -> list[Declared]:
    """Everything that code declares: registered functions, and the app's beat_schedule and periodic tasks.

    Raises:
        DuplicateTaskError: Two declarations have one name.
    """
    found = [
        _of_options(task_registry.options(name))
        for name in task_registry.names()
        if task_registry.options(name).is_scheduled
    ]
    names = {item.name for item in found}
    for name, entry in dict(at.app.conf.beat_schedule or {}).items():
        if name in names:
            raise DuplicateTaskError(
                f"beat_schedule entry {name!r} has the name of a registered function's schedule; rename one"
            )
        made = _of_entry(name, entry)
        if made is not None:
            found.append(made)
    return found


def sync(at: Station) -> tuple[str, ...]:
    """Write what code declares: new ones begin, changed ones move, unchanged ones keep their next run.

    Returns:
        The declared names.
    """
    declared = declared_of(at)
    now = at.database.now()
    with at.database.transaction() as tx:
        stored = {row.name: row for row in schedules.find(tx, at.name, declared=True)}
        for item in declared:
            before = stored.get(item.name)
            row = _row(at, item, before, now)
            if row != before:
                schedules.put(tx, row, now)
    return tuple(item.name for item in declared)


def complete_removed(at: Station, mine: tuple[str, ...]) -> None:
    """Complete the declared schedules that no live beat of this app declares any more."""
    now = at.database.now()
    live = {ScheduleState.ACTIVE, ScheduleState.PAUSED}
    with at.database.reading() as connection:
        gone = [row for row in schedules.find(connection, at.name, declared=True, states=live) if row.name not in mine]
        if not gone:
            return
        beats = processes.alive(connection, at.name, now - at.settings.lease_time, kind="beat")
    elsewhere = {name for beat in beats for name in beat.declared}
    with at.database.transaction() as tx:
        for row in gone:
            locked = schedules.get(tx, row.id, lock=True)
            if row.name not in elsewhere and locked is not None and locked.state in live:
                logger.info("schedule %r left the code and is completed", row.name)
                schedules.put(tx, replace(locked, state=ScheduleState.COMPLETED, next_run_at=None, reason=REMOVED), now)


def _row(at: Station, item: Declared, before: Schedule | None, now: datetime) -> Schedule:
    zone = item.timezone or (before.timezone if before is not None and before.timezone else default_zone(at))
    trigger = item.trigger(now, zone)
    fresh = Schedule(
        id=before.id if before else str(uuid.uuid4()),
        app=at.name,
        name=item.name,
        func_name=item.func_name,
        args=item.args,
        kwargs=item.kwargs,
        options=item.options,
        declared_key=f"{at.name}:{item.name}",
        handed=item.handed,
        next_run_at=trigger.next_after(now),
        **trigger_columns(trigger),
    )
    if before is None:
        return fresh
    kept: dict[str, Any] = {
        name: getattr(before, name)
        for name in ("state", "reason", "last_run_at", "ends_at", "created_at", "updated_at")
    }
    back = before.state is ScheduleState.COMPLETED and before.reason == REMOVED
    set_aside = before.state is ScheduleState.ACTIVE and before.next_run_at is None
    if back:
        kept |= {"state": ScheduleState.ACTIVE, "reason": None}
    elif set_aside:
        kept["reason"] = None
    elif before.same_trigger(fresh):
        kept |= {"anchor": before.anchor, "next_run_at": before.next_run_at}
    elif before.state is not ScheduleState.ACTIVE:
        kept["next_run_at"] = None
    return replace(fresh, **kept)


def _of_options(options: TaskOptions) -> Declared:
    def trigger(now: datetime, zone: str) -> Trigger:
        if options.interval_minutes is not None:
            every = timedelta(minutes=options.interval_minutes)
            return Interval(every, now + every)
        assert options.schedule is not None
        return Cron(options.schedule, zone)

    # max_instances, priority and the rest are the function's own: its runs have them already.
    kept = {
        "misfire": options.misfire,
        "misfire_grace": options.misfire_grace,
        "priority": options.priority,
        "queue": options.queue,
    }
    return Declared(
        name=options.name,
        func_name=options.name,
        trigger=trigger,
        timezone=options.timezone,
        args=[],
        kwargs={},
        options={name: value for name, value in kept.items() if value is not None},
        handed=False,
    )


def _of_entry(name: str, entry: Any) -> Declared | None:
    """An entry of Celery's beat_schedule; one with a schedule of another kind is left out, and that is said."""
    rule = entry["schedule"]
    try:
        trigger, zone = _trigger_of(rule)
    except (ConfigurationError, InvalidTriggerError) as error:
        logger.error("beat_schedule entry %r is left out: %s", name, error)
        return None
    func_name = entry["task"]
    options = {
        key: value for key, value in (entry.get("options") or {}).items() if key in {"queue", "expires", "priority"}
    }
    return Declared(
        name=name,
        func_name=func_name,
        trigger=trigger,
        timezone=zone,
        args=list(entry.get("args") or ()),
        kwargs=dict(entry.get("kwargs") or {}),
        options=options,
        handed=func_name not in task_registry,
    )


def _trigger_of(rule: Any) -> tuple[Callable[[datetime, str], Trigger], str | None]:
    if isinstance(rule, crontab):
        expression = " ".join(
            str(part).replace(" ", "")
            for part in (
                rule._orig_minute,
                rule._orig_hour,
                rule._orig_day_of_month,
                rule._orig_month_of_year,
                rule._orig_day_of_week,
            )
        )
        zone = str(rule.tz) if rule.tz is not None else "UTC"
        Cron(expression, zone)
        return (lambda _now, zone: Cron(expression, zone)), zone
    every = rule.run_every if isinstance(rule, celery_schedule) else rule
    if isinstance(every, int | float) and not isinstance(every, bool):
        every = timedelta(seconds=every)
    if not isinstance(every, timedelta):
        raise ConfigurationError(f"schedule {rule!r}: expected crontab(...), a number of seconds or a timedelta")
    span = every
    return (lambda now, _zone: Interval(span, now + span)), None
