"""Celery's own beat entries, of ``beat_schedule`` and ``add_periodic_task``, as declared schedules."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from celery.schedules import crontab
from celery.schedules import schedule as every_so_often

from llmtasks import sender
from llmtasks.checks import check_whole
from llmtasks.dispatch import Station
from llmtasks.errors import ConfigurationError, LLMTasksError
from llmtasks.plan import default_zone, plain
from llmtasks.policies import POLICY_NAMES, check_policies, seconds_of
from llmtasks.registry import task_registry
from llmtasks.triggers import Cron, Interval, Trigger

logger = logging.getLogger(__name__)

#: What of an entry's options goes into the message as Celery has it.
MESSAGE_OPTIONS: Final = frozenset(
    {
        "exchange", "headers", "ignore_result", "link", "link_error", "routing_key", "shadow", "soft_time_limit",
        "time_limit",
    }
)  # fmt: skip
#: As long as the column.
LONGEST_NAME: Final = 200
#: Any instant: only shows whether an interval is one.
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A schedule as code declares it. The trigger may need the present, and the zone in use before."""

    name: str
    func_name: str
    trigger: Callable[[datetime, str], Trigger]
    #: The zone that the declaration names; None leaves it to the app, and to what is stored.
    timezone: str | None
    args: list[Any]
    kwargs: dict[str, Any]
    options: dict[str, Any]
    handed: bool
    starts_at: datetime | None = None
    ends_at: datetime | None = None


def declared_entries(at: Station) -> list[Declared]:
    """The app's entries; one that cannot be a schedule here is left out, and that is said."""
    found: list[Declared] = []
    for name, entry in dict(at.app.conf.beat_schedule or {}).items():
        try:
            found.append(_declared(at, name, entry))
        except (LLMTasksError, KeyError, TypeError, ValueError) as error:
            logger.error("beat_schedule entry %r is left out: %s", name, error)
    return found


def _declared(at: Station, name: str, entry: Mapping[str, Any]) -> Declared:
    func_name = entry["task"]
    known = func_name in task_registry
    handed = not known or task_registry.options(func_name).ledger == "off"
    if name in task_registry and task_registry.options(name).is_scheduled:
        raise ConfigurationError("a registered function's own schedule has this name; rename one")
    trigger, zone = _trigger_of(at, entry["schedule"])
    return Declared(
        name=_short(name),
        func_name=func_name,
        trigger=trigger,
        timezone=zone,
        args=plain(list(entry.get("args") or ()), "args"),
        kwargs=plain(dict(entry.get("kwargs") or {}), "kwargs"),
        options=_options(at, entry.get("options") or {}, native=not known),
        handed=handed,
    )


def _options(at: Station, given: Mapping[str, Any], *, native: bool) -> dict[str, Any]:
    message = {key: value for key, value in given.items() if key in MESSAGE_OPTIONS and value is not None}
    priority, expires = given.get("priority"), given.get("expires")
    if native and priority is not None:
        # A plain Celery task's priority is the transport's own number.
        priority = sender.user_priority(at.app, priority)
    check_whole("priority", priority, 1, 10)
    check_policies(given)
    policies = {name: seconds_of(given.get(name)) for name in POLICY_NAMES}
    options = {
        "queue": given.get("queue"),
        "priority": priority,
        # Seconds count from when the message is sent, which is what as_task_v2 makes of a number.
        "expires": expires.isoformat() if isinstance(expires, datetime) else expires,
        "celery": plain(message, "options"),
        **policies,
    }
    return {name: value for name, value in options.items() if value not in (None, {})}


def _trigger_of(at: Station, rule: Any) -> tuple[Callable[[datetime, str], Trigger], str | None]:
    if isinstance(rule, crontab):
        expression, zone = cron_of(rule), _zone_of(at, rule.tz)
        Cron(expression, zone)
        return (lambda _now, zone: Cron(expression, zone)), zone
    every = rule.run_every if isinstance(rule, every_so_often) else rule  # type: ignore[attr-defined]  # its stub lacks it
    if isinstance(every, int | float) and not isinstance(every, bool):
        every = timedelta(seconds=every)
    if not isinstance(every, timedelta):
        raise ConfigurationError(f"schedule {rule!r}: expected crontab(...), a number of seconds or a timedelta")
    span = every
    Interval(span, _EPOCH)
    return (lambda now, _zone: Interval(span, now + span)), None


def cron_of(rule: Any) -> str:
    """Celery's crontab as a cron expression that names the same times.

    Raises:
        ConfigurationError: There is none: Celery wants both the day of month and the day of week to fit, cron either.
    """
    minute = _field(rule._orig_minute, rule.minute)
    hour = _field(rule._orig_hour, rule.hour)
    day = _field(rule._orig_day_of_month, rule.day_of_month)
    month = _field(rule._orig_month_of_year, rule.month_of_year)
    weekday = _field(rule._orig_day_of_week, rule.day_of_week)
    if not day.startswith("*") and not weekday.startswith("*"):
        # Cron joins the two by "and" where one begins with a star; these are only the 1st and only Sunday.
        if 1 in rule.day_of_month:
            day = f"*/31,{day}"
        elif 0 in rule.day_of_week:
            weekday = f"*/8,{weekday}"
        else:
            raise ConfigurationError(
                f"{rule!r} limits both the day of month and the day of week: Celery wants both to fit, cron either; "
                "limit one, and check the other in the function"
            )
    return f"{minute} {hour} {day} {month} {weekday}"


def _field(written: Any, numbers: set[int]) -> str:
    """One field: as written where that is a plain ``*`` or ``*/n``, whose star means more than its numbers."""
    text = str(written)
    if text == "*" or (text.startswith("*/") and text[2:].isdigit()):
        return text
    return ",".join(map(str, sorted(numbers)))


def _zone_of(at: Station, zone: Any) -> str:
    name = getattr(zone, "key", None) or getattr(zone, "zone", None)  # zoneinfo's, pytz's
    if name is not None:
        return str(name)
    return "UTC" if zone is UTC else default_zone(at)


def _short(name: str) -> str:
    """The name, cut where it is longer than the column: an entry without one is named by its whole signature."""
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: LONGEST_NAME - 13]}-{digest}"
