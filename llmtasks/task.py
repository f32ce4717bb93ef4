"""Task: the public handle of one stored schedule, periodic or one-off."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self

import tzlocal

from llmtasks import dispatch, sender
from llmtasks.dispatch import Station, run_of, station
from llmtasks.errors import (
    ConfigurationError,
    ForbiddenTransitionError,
    InvalidParamsError,
    InvalidTriggerError,
    TaskNotFoundError,
)
from llmtasks.options import check_schedule_options, check_whole
from llmtasks.registry import task_registry
from llmtasks.states import ScheduleState
from llmtasks.store import cancelling, schedules
from llmtasks.store.joining import joined
from llmtasks.store.runs import Run
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Cron, Interval, Once, Trigger

#: What a Task may say in place of its function's registration; kept in the row as given.
OPTION_NAMES: Final = ("priority", "timeout", "max_retries", "max_instances", "queue", "misfire", "misfire_grace")


@dataclass(kw_only=True, eq=False)
class Task:
    """One stored schedule. Nothing is stored before ``save``; the state and the times are what the last call read.

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
    state: ScheduleState | None = field(default=None, init=False)
    reason: str | None = field(default=None, init=False)
    last_run_at: datetime | None = field(default=None, init=False)
    created_at: datetime | None = field(default=None, init=False)
    updated_at: datetime | None = field(default=None, init=False)
    _row: Schedule | None = field(default=None, init=False, repr=False)

    # -- storing

    def save_sync(self, session: Any = None) -> Self:
        """Store the Task, new or changed; it takes effect at once. The next run moves only if the trigger changed.

        Args:
            session: A SQLAlchemy Session on llmtasks' database: the Task is stored by the session's own transaction.

        Raises:
            UnknownTaskFunctionError: No function is registered as ``func_name``.
            InvalidParamsError: ``params`` do not fit its signature, or JSON cannot carry them.
            InvalidTriggerError: There is no trigger or more than one, it is not readable, or it never fires.
            InvalidOptionError: An option has a value that it cannot have.
            ConfigurationError: The session is on another database.
        """
        at = station()
        now = at.database.now()
        checked = self._checked(at, now)
        if session is not None:
            self._adopt(self._store(joined(at.database, session), at, checked, now))
        else:
            with at.database.transaction() as tx:
                stored = self._store(tx, at, checked, now)
            self._adopt(stored)
        return self

    async def save(self, session: Any = None) -> Self:
        """As ``save_sync``, in a thread; ``session`` may be an AsyncSession."""
        if session is None:
            return await asyncio.to_thread(self.save_sync)
        if hasattr(session, "run_sync"):
            await session.run_sync(self.save_sync)
            return self
        return self.save_sync(session)

    # -- control

    def pause_sync(self) -> Self:
        """Fire no more until resumed; runs that exist go on.

        Raises:
            ForbiddenTransitionError: The Task is cancelled or completed.
        """
        return self._move({ScheduleState.ACTIVE, ScheduleState.PAUSED}, ScheduleState.PAUSED, "pause")

    def resume_sync(self) -> Self:
        """Fire again from the next instant on; nothing that was missed runs. Raises as ``pause_sync`` does."""
        return self._move({ScheduleState.ACTIVE, ScheduleState.PAUSED}, ScheduleState.ACTIVE, "resume")

    def cancel_sync(self, reason: str = "its Task was cancelled") -> Self:
        """End the schedule and its unfinished runs for good; a run that has not started never will."""
        at = station()
        now = at.database.now()
        with at.database.transaction() as tx:
            row = self._locked(tx)
            stored = schedules.put(
                tx, replace(row, state=ScheduleState.CANCELLED, next_run_at=None, reason=reason), now
            )
            ids = cancelling.cancel_of_schedule(tx, stored.id, now, reason)
        self._adopt(stored)
        dispatch.announce_cancelled(at, ids)
        return self

    def execute_now_sync(self) -> Run:
        """Run the function now, in whatever state the Task is; its schedule does not move.

        Returns:
            The run, which is stored and sent.
        """
        at = station()
        with at.database.reading() as connection:
            row = self._locked(connection, lock=False)
        return dispatch.dispatch(at, run_of(row))

    async def pause(self) -> Self:
        """As ``pause_sync``, in a thread."""
        return await asyncio.to_thread(self.pause_sync)

    async def resume(self) -> Self:
        """As ``resume_sync``, in a thread."""
        return await asyncio.to_thread(self.resume_sync)

    async def cancel(self, reason: str = "its Task was cancelled") -> Self:
        """As ``cancel_sync``, in a thread."""
        return await asyncio.to_thread(self.cancel_sync, reason)

    async def execute_now(self) -> Run:
        """As ``execute_now_sync``, in a thread."""
        return await asyncio.to_thread(self.execute_now_sync)

    @staticmethod
    def cancel_run_sync(run_id: str, reason: str = "cancelled") -> Run | None:
        """Cancel one run, those of ``.delay()`` too; an id that is not known yet is remembered as cancelled.

        Returns:
            The run as it is now; None where nobody knows it yet.
        """
        return dispatch.cancel_run(station(), run_id, reason)

    @staticmethod
    async def cancel_run(run_id: str, reason: str = "cancelled") -> Run | None:
        """As ``cancel_run_sync``, in a thread."""
        return await asyncio.to_thread(Task.cancel_run_sync, run_id, reason)

    # -- reading

    @classmethod
    def get_sync(cls, id_or_name: str) -> Task:
        """The Task with this id, else the one with this name.

        Raises:
            TaskNotFoundError: There is none, or several share the name.
        """
        at = station()
        with at.database.reading() as connection:
            found = schedules.get(connection, id_or_name)
            named = [] if found else schedules.find(connection, at.name, name=id_or_name)
        if found is None and len(named) > 1:
            ids = ", ".join(item.id for item in named)
            raise TaskNotFoundError(f"{len(named)} Tasks are named {id_or_name!r}: name one by its id: {ids}")
        if found is None and not named:
            raise TaskNotFoundError(f"no Task has the id or name {id_or_name!r}; `llmtasks schedules` lists them")
        return cls._from(found or named[0])

    @classmethod
    def list_sync(
        cls,
        *,
        name: str | None = None,
        func_name: str | None = None,
        states: Iterable[ScheduleState | str] = (),
        limit: int | None = None,
    ) -> list[Task]:
        """The app's Tasks, those declared in code included, by name."""
        at = station()
        wanted = [ScheduleState(state) for state in states]
        with at.database.reading() as connection:
            found = schedules.find(connection, at.name, name=name, func_name=func_name, states=wanted, limit=limit)
        return [cls._from(row) for row in found]

    @classmethod
    async def get(cls, id_or_name: str) -> Task:
        """As ``get_sync``, in a thread."""
        return await asyncio.to_thread(cls.get_sync, id_or_name)

    @classmethod
    async def list(
        cls,
        *,
        name: str | None = None,
        func_name: str | None = None,
        states: Iterable[ScheduleState | str] = (),
        limit: int | None = None,
    ) -> list[Task]:
        """As ``list_sync``, in a thread."""
        return await asyncio.to_thread(cls.list_sync, name=name, func_name=func_name, states=states, limit=limit)

    def next_runs(self, count: int = 5) -> list[datetime]:
        """The next instants, UTC; of a Task that is not active those that it would have if it were resumed now."""
        check_whole("count", count, 0, 10_000)
        at = station()
        now = at.database.now()
        row = self._row or self._checked(at, now)
        found: list[datetime] = []
        instant = row.next_run_at if row.state is ScheduleState.ACTIVE else row.trigger.next_after(now)
        while instant is not None and len(found) < count and (row.ends_at is None or instant <= row.ends_at):
            found.append(instant)
            instant = row.trigger.next_after(instant)
        return found

    # -- inside

    def _checked(self, at: Station, now: datetime) -> Schedule:
        """The Task as a row, everything checked that can be checked without the database."""
        values = {name: getattr(self, name) for name in OPTION_NAMES}
        check_schedule_options({**values, "interval_minutes": self.interval_minutes, "timezone": self.timezone})
        if self._row is None or not self._row.handed:
            check_arguments(self.func_name, self.params)
        options = {name: value for name, value in values.items() if value is not None}
        trigger = self._trigger(at, now)
        first = trigger.next_after(now) if not isinstance(trigger, Interval) else max(trigger.anchor, now)
        ends_at = _aware(self.ends_at)
        return Schedule(
            id=self.id or str(uuid.uuid4()),
            app=at.name,
            name=self.name or self.func_name,
            func_name=self.func_name,
            kwargs=self.params,
            options=options,
            next_run_at=first,
            ends_at=ends_at,
            **trigger_columns(trigger),
        )

    def _trigger(self, at: Station, now: datetime) -> Trigger:
        given = {
            name: getattr(self, name)
            for name in ("scheduled_at", "interval_minutes", "schedule")
            if getattr(self, name) is not None
        }
        if len(given) != 1:
            raise InvalidTriggerError(
                f"Task {self.name or self.func_name!r} has {'no trigger' if not given else 'the triggers ' + ', '.join(given)}: "
                "expected exactly one of scheduled_at, interval_minutes, schedule"
            )
        if self.timezone is not None and self.schedule is None:
            raise InvalidTriggerError(f"timezone={self.timezone!r}: expected only together with schedule")
        if self.scheduled_at is not None:
            once = Once(self.scheduled_at)
            if once.at <= now and (self._row is None or self._row.anchor != once.at):
                raise InvalidTriggerError(
                    f"scheduled_at={self.scheduled_at.isoformat()}: expected an instant after now ({now.isoformat()}); "
                    "execute_now() runs it at once"
                )
            return once
        if self.interval_minutes is not None:
            every = timedelta(minutes=self.interval_minutes)
            first = _aware(self.next_run_at)
            return Interval(every, now + every if first is None else max(first, now))
        if self.next_run_at is not None and (self._row is None or self.next_run_at != self._row.next_run_at):
            raise InvalidTriggerError(
                "next_run_at: expected only together with interval_minutes; a cron expression names its own"
            )
        assert self.schedule is not None
        return Cron(self.schedule, self.timezone or (self._row and self._row.timezone) or default_zone(at))

    def _store(self, tx: Any, at: Station, checked: Schedule, now: datetime) -> Schedule:
        before = schedules.get(tx, checked.id, lock=True) if self.id else None
        if before is None:
            return schedules.put(tx, checked, now)
        kept = {
            name: getattr(before, name)
            for name in ("app", "args", "declared_key", "handed", "state", "reason", "last_run_at", "created_at")
        }
        moved = not before.same_trigger(checked) or (
            self.interval_minutes is not None and self._row is not None and self.next_run_at != self._row.next_run_at
        )
        if not moved:
            kept |= {"anchor": before.anchor, "next_run_at": before.next_run_at}
        elif before.state is ScheduleState.COMPLETED:
            kept |= {"state": ScheduleState.ACTIVE, "reason": None}
        elif before.state is not ScheduleState.ACTIVE:
            kept["next_run_at"] = None
        return schedules.put(tx, replace(checked, **kept), now)

    def _move(self, allowed: set[ScheduleState], to: ScheduleState, verb: str) -> Self:
        at = station()
        now = at.database.now()
        with at.database.transaction() as tx:
            row = self._locked(tx)
            if row.state not in allowed:
                raise ForbiddenTransitionError(
                    f"Task {row.name!r} ({row.id}) is {row.state}: {verb} works on an active or a paused one; save a new Task instead"
                )
            if row.state is not to:
                row = schedules.put(tx, _moved(row, to, now), now)
        self._adopt(row)
        return self

    def _locked(self, tx: Any, *, lock: bool = True) -> Schedule:
        if self.id is None:
            raise ConfigurationError(f"Task {self.name or self.func_name!r} is not stored yet: call save() first")
        found = schedules.get(tx, self.id, lock=lock)
        if found is None:
            raise TaskNotFoundError(f"no Task has the id {self.id!r} any more")
        return found

    def _adopt(self, row: Schedule) -> None:
        """Show what the row says."""
        self.id, self.name, self.state, self.reason = row.id, row.name, row.state, row.reason
        self.timezone = row.timezone
        self.next_run_at, self.last_run_at, self.ends_at = row.next_run_at, row.last_run_at, row.ends_at
        self.created_at, self.updated_at = row.created_at, row.updated_at
        self._row = row

    @classmethod
    def _from(cls, row: Schedule) -> Task:
        task = cls(
            func_name=row.func_name,
            params=row.kwargs,
            scheduled_at=row.anchor if row.kind == "once" else None,
            interval_minutes=row.every_us / 60_000_000 if row.every_us else None,
            schedule=row.expression,
            **{name: row.options.get(name) for name in OPTION_NAMES},
        )
        task._adopt(row)
        return task


def _moved(row: Schedule, to: ScheduleState, now: datetime) -> Schedule:
    if to is ScheduleState.PAUSED:
        return replace(row, state=to, next_run_at=None, reason=None)
    following = row.trigger.next_after(now)
    if following is None or (row.ends_at is not None and following > row.ends_at):
        return replace(
            row, state=ScheduleState.COMPLETED, next_run_at=None, reason="its last instant passed while it was paused"
        )
    return replace(row, state=to, next_run_at=following, reason=None)


def check_arguments(func_name: str, params: Any) -> None:
    """Check that a registered function can be called with ``params`` and that JSON can carry them.

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
    sender.dumps(params, "params")


def default_zone(at: Station) -> str:
    """The zone of a cron expression that names none: the app's, else this process's."""
    zone = at.settings.timezone
    return str(zone) if zone else tzlocal.get_localzone_name() or "UTC"


def _aware(value: datetime | None) -> datetime | None:
    """A naive datetime is the machine's local time, which is what ``datetime.now()`` gives."""
    return None if value is None else value.astimezone(UTC)
