"""Plan: what a schedule should be, as a Task says it; checked, it becomes a row.

Nothing here reads or writes: rows and instants go in, rows come out.
"""

from __future__ import annotations

import inspect
import json
import uuid
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final

from llmtasks import sender
from llmtasks.dispatch import Station
from llmtasks.errors import ForbiddenTransitionError, InvalidOptionError, InvalidParamsError, InvalidTriggerError
from llmtasks.options import check_schedule_options
from llmtasks.registry import task_registry
from llmtasks.states import ScheduleState
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Cron, Interval, Once, Trigger

#: What a row keeps when its Task is saved again.
_KEPT: Final = ("app", "state", "reason", "last_run_at", "created_at")
#: What a Task may say in place of its function's registration; kept in the row as given.
OPTION_NAMES: Final = ("priority", "timeout", "max_retries", "max_instances", "queue", "misfire", "misfire_grace")


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
        misfire: "once", "skip" or "all": what happens to instants that nobody could dispatch in time.
        misfire_grace: Seconds after which an instant counts as missed.
        ends_at: No instant after this one runs.
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
    misfire: str | None = None
    misfire_grace: float | None = None
    ends_at: datetime | None = None
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
        trigger = self._trigger(at, now)
        return Schedule(
            id=self.id or str(uuid.uuid4()),
            app=at.name,
            name=self.name or self.func_name,
            func_name=self.func_name,
            kwargs=self._checked_params(),
            options={name: value for name, value in values.items() if value is not None},
            next_run_at=trigger.anchor if isinstance(trigger, Interval) else trigger.next_after(now),
            ends_at=None if self.ends_at is None else _instant("ends_at", self.ends_at),
            **trigger_columns(trigger),
        )

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
        once = Once(_instant("scheduled_at", self.scheduled_at))
        if once.at <= now and (seen is None or seen.kind != "once" or seen.anchor != once.at):
            raise _past(once.at, now)
        return once

    def _interval(self, minutes: float, now: datetime) -> Interval:
        try:
            every = timedelta(minutes=minutes)
        except OverflowError:
            raise InvalidTriggerError(f"interval_minutes={minutes!r}: expected at most a hundred years") from None
        if self.next_run_at is not None and self._asks_for_next_run:
            return Interval(every, max(_instant("next_run_at", self.next_run_at), now))
        return Interval(every, now + every)


def begun(row: Schedule, now: datetime) -> Schedule:
    """A checked row as it is first stored.

    Raises:
        InvalidTriggerError: It would never run.
    """
    if row.kind == "once" and row.anchor is not None and row.anchor <= now:
        raise _past(row.anchor, now)
    return _within_end(row)


def saved_over(before: Schedule, checked: Schedule, *, moved: bool, now: datetime) -> Schedule:
    """A checked row as it replaces the one that is there: the next run moves only if the trigger changed.

    Args:
        before: What is stored.
        checked: What is wanted.
        moved: Whether the next run moves although the trigger is the same.
        now: An interval that was set aside goes on at its first instant after this.

    Raises:
        ForbiddenTransitionError: What is stored is cancelled, or code declares it otherwise.
        InvalidTriggerError: It would never run again.
    """
    if before.state is ScheduleState.CANCELLED:
        raise ForbiddenTransitionError(
            f"Task {before.name!r} ({before.id}) is cancelled for good: save a new Task instead"
        )
    if before.declared_key is not None:
        return _as_declared(before, checked)
    kept = {name: getattr(before, name) for name in _KEPT}
    moved = moved or not before.same_trigger(checked)
    if not moved:
        # A row that was set aside begins again at its next instant.
        checked = replace(checked, anchor=before.anchor or checked.anchor)
        kept["next_run_at"] = before.next_run_at or checked.trigger.next_after(now)
    if before.state is ScheduleState.ACTIVE or (moved and before.state is ScheduleState.COMPLETED):
        kept |= {"state": ScheduleState.ACTIVE, "reason": None}
    else:
        kept["next_run_at"] = None
    return _within_end(replace(checked, **kept))


def paused(row: Schedule) -> Schedule:
    """A row that fires no more until it is resumed."""
    return replace(row, state=ScheduleState.PAUSED, next_run_at=None, reason=None)


def resumed(row: Schedule, now: datetime) -> Schedule:
    """A row that fires at its next instant after ``now``; without one it is completed."""
    following = row.trigger.next_after(now)
    if following is None or (row.ends_at is not None and following > row.ends_at):
        over = "its last instant passed while it was paused"
        return replace(row, state=ScheduleState.COMPLETED, next_run_at=None, reason=over)
    return replace(row, state=ScheduleState.ACTIVE, next_run_at=following, reason=None)


def check_params(func_name: str, params: object) -> None:
    """Check that a registered function can be called with ``params``.

    Raises:
        UnknownTaskFunctionError: No function has this name.
        InvalidParamsError: The parameters do not fit; the error names the function's signature.
    """
    function = task_registry.function(func_name)
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


def _past(at: datetime, now: datetime) -> InvalidTriggerError:
    return InvalidTriggerError(
        f"scheduled_at={at.isoformat()}: expected an instant after now ({now.isoformat()}); "
        "execute_now() runs it at once"
    )


def _within_end(row: Schedule) -> Schedule:
    if row.ends_at is not None and row.next_run_at is not None and row.next_run_at > row.ends_at:
        raise InvalidTriggerError(
            f"ends_at={row.ends_at.isoformat()}: expected not before the next run, {row.next_run_at.isoformat()}"
        )
    return row


def _as_declared(before: Schedule, checked: Schedule) -> Schedule:
    """The row as it is; raises where what code declares would change."""
    shown = {name: before.options[name] for name in OPTION_NAMES if name in before.options}
    mine = (before.name, before.func_name, before.kwargs, shown, before.ends_at)
    theirs = (checked.name, checked.func_name, checked.kwargs, checked.options, checked.ends_at)
    if mine != theirs or not before.same_trigger(checked):
        raise ForbiddenTransitionError(
            f"schedule {before.name!r} is declared in code, which owns its trigger, params and options: "
            "change them there; pause, resume, cancel and execute_now work here"
        )
    return before


def _instant(option: str, value: object) -> datetime:
    """A datetime in UTC; a naive one is the machine's local time, which is what ``datetime.now()`` gives."""
    if not isinstance(value, datetime):
        raise InvalidTriggerError(f"{option}={value!r}: expected a datetime, such as datetime.now()")
    try:
        return Once(value).at
    except InvalidTriggerError as error:
        raise InvalidTriggerError(str(error).replace("at=", f"{option}=", 1)) from None


def _check_text(option: str, value: object, most: int) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        raise InvalidOptionError(option, value, f"a text of 1 to {most} characters")
