"""Plan: what a schedule should be, as a Task says it; checked, it becomes a row.

Nothing here reads or writes: rows and instants go in, rows come out.
"""

from __future__ import annotations

import inspect
import json
import uuid
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from llmtasks import sender
from llmtasks.changes import OPTION_NAMES, first_run, past
from llmtasks.checks import instant_of
from llmtasks.dispatch import Station
from llmtasks.errors import InvalidOptionError, InvalidParamsError, InvalidTriggerError
from llmtasks.options import check_schedule_options
from llmtasks.policies import check_bounds, seconds_of
from llmtasks.registry import task_registry
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Cron, Interval, Once, Trigger


@dataclass(kw_only=True, eq=False)
class Plan:
    """What one schedule should be.

    Attributes:
        func_name: The task function's registered name.
        name: What people call it; defaults to ``func_name``. App-created Tasks may share a name.
        params: Keyword arguments of the function.
        scheduled_at: Runs once at this instant.
        interval_minutes: Runs every so many minutes.
        next_run_at: The first run of an interval, and the origin of its grid; in the past it means now.
        schedule: Runs when this cron expression says.
        timezone: The zone of ``schedule``; defaults to the Celery app's, else to this process's.
        priority: 1 (first) to 10.
        timeout: Seconds that one attempt may take.
        max_retries: Attempts after the first.
        max_instances: How many runs of this schedule may run at once, within its function's own limit.
        queue: The Celery queue.
        overlap: "skip", "queue_one", "allow" or "cancel_running": what happens to an instant that comes while another
            run of this schedule is unfinished.
        misfire: "once", "skip" or "all": what happens to instants that nobody could dispatch in time.
        misfire_grace: Seconds after which an instant counts as missed.
        misfire_window: Seconds, or a timedelta; misfire "all" runs no instant that is later than this.
        starts_at: No instant before this one runs; the first run of an interval that names no ``next_run_at``.
        ends_at: No instant after this one runs.
        max_runs: After so many runs of its instants the schedule is completed.
        jitter_seconds: Each run of an instant is sent later by a part of this, which chance chooses once.
        id: Given by the first ``save``.
    """

    func_name: str
    name: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    scheduled_at: datetime | None = None
    interval_minutes: float | None = None
    next_run_at: datetime | None = None
    schedule: str | None = None
    timezone: str | None = None
    priority: int | None = None
    timeout: float | None = None
    max_retries: int | None = None
    max_instances: int | None = None
    queue: str | None = None
    overlap: str | None = None
    misfire: str | None = None
    misfire_grace: float | None = None
    misfire_window: float | timedelta | None = None
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    max_runs: int | None = None
    jitter_seconds: float | None = None
    id: str | None = None
    #: The row as it was read or written last.
    _row: Schedule | None = field(default=None, init=False, repr=False)

    def _checked(self, at: Station, now: datetime) -> Schedule:
        """The plan as a row that begins now; raises what ``Task.save`` says."""
        _check_text("func_name", self.func_name, 200)
        if self.name is not None:
            _check_text("name", self.name, 200)
        if self.id is not None:
            _check_text("id", self.id, 36)
        values = {name: getattr(self, name) for name in OPTION_NAMES}
        check_schedule_options({**values, "interval_minutes": self.interval_minutes, "timezone": self.timezone})
        values["misfire_window"] = seconds_of(self.misfire_window)
        starts_at, ends_at = check_bounds(self.starts_at, self.ends_at)
        trigger = self._trigger(at, now)
        row = Schedule(
            id=self.id or str(uuid.uuid4()),
            app=at.name,
            name=self.name or self.func_name,
            func_name=self.func_name,
            kwargs=self._checked_params(),
            options={name: value for name, value in values.items() if value is not None},
            starts_at=starts_at,
            ends_at=ends_at,
            **trigger_columns(trigger),
        )
        return replace(row, next_run_at=first_run(row, now))

    @property
    def _asks_for_next_run(self) -> bool:
        """Whether somebody set ``next_run_at``, which otherwise shows what was read."""
        return self.next_run_at is not None and (self._row is None or self.next_run_at != self._row.next_run_at)

    def _checked_params(self) -> dict[str, Any]:
        if self._row is None or not self._row.handed:
            check_params(self.func_name, self.params)
        return dict(plain(self.params, "params"))

    def _trigger(self, at: Station, now: datetime) -> Trigger:
        names = ("scheduled_at", "interval_minutes", "schedule")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidTriggerError(
                f"Task {self.name or self.func_name!r} has {' and '.join(given) or 'no trigger'}: "
                f"expected exactly one of {', '.join(names)}"
            )
        seen = self._row
        if self.schedule is None and self.timezone is not None and (seen is None or self.timezone != seen.timezone):
            raise InvalidTriggerError(f"timezone={self.timezone!r}: expected only together with schedule")
        if self.interval_minutes is None and self._asks_for_next_run:
            raise InvalidTriggerError(
                f"next_run_at={self.next_run_at!r}: expected only together with interval_minutes; "
                f"{given[0]} names its own instants"
            )
        if self.schedule is not None:
            return Cron(self.schedule, self.timezone or default_zone(at))
        if self.interval_minutes is not None:
            return self._interval(self.interval_minutes, now)
        assert self.scheduled_at is not None
        once = Once(instant_of("scheduled_at", self.scheduled_at))
        if once.at <= now and (seen is None or seen.kind != "once" or seen.anchor != once.at):
            raise past(once.at, now)
        return once

    def _interval(self, minutes: float, now: datetime) -> Interval:
        try:
            every = timedelta(minutes=minutes)
        except OverflowError:
            raise InvalidTriggerError(f"interval_minutes={minutes!r}: expected at most a hundred years") from None
        if self.next_run_at is not None and self._asks_for_next_run:
            return Interval(every, max(instant_of("next_run_at", self.next_run_at), now))
        if self.starts_at is not None and (starts_at := instant_of("starts_at", self.starts_at)) > now:
            return Interval(every, starts_at)
        return Interval(every, now + every)


def check_params(func_name: str, params: object) -> None:
    """Check that a registered function can be called with ``params``.

    Raises:
        UnknownTaskFunctionError: No function has this name.
        InvalidParamsError: The parameters do not fit; the error names the function's signature.
    """
    function = task_registry.function(func_name)
    if task_registry.options(func_name).ledger == "off":
        raise InvalidOptionError(
            "func_name", func_name, "a function whose runs are in the ledger", "It is registered with ledger='off'."
        )
    takes_self = bool(task_registry.options(func_name).celery.get("bind"))
    if not isinstance(params, dict) or not all(isinstance(name, str) for name in params):
        raise InvalidParamsError(f"params={params!r}: expected a dict of the function's parameters by name")
    signature = inspect.signature(function)
    try:
        signature.bind(*((None,) if takes_self else ()), **params)
    except TypeError as misfit:
        raise InvalidParamsError(f"params of {func_name!r} do not fit its signature {signature}: {misfit}") from None


def plain(value: Any, what: str) -> Any:
    """``value`` as what JSON itself knows; dates, UUIDs and decimals as the message will carry them.

    Raises:
        InvalidParamsError: JSON cannot carry it; the error names the path to the value.
    """
    return json.loads(sender.dumps(value, what))


def rich(value: Any) -> Any:
    """What ``plain`` made plain."""
    return sender.loads(json.dumps(value))


def default_zone(at: Station) -> str:
    """The zone of a cron expression that names none: the app's, else this process's."""
    if at.settings.timezone:
        return str(at.settings.timezone)
    import tzlocal  # seldom needed, and it reads files when it is imported

    return tzlocal.get_localzone_name() or "UTC"


def _check_text(option: str, value: object, most: int) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        raise InvalidOptionError(option, value, f"a text of 1 to {most} characters")
