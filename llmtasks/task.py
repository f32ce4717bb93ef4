"""Task: the public handle of one stored schedule, periodic or one-off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from typing import Any, Self, TypeAlias

from llmtasks import backfill, dispatch
from llmtasks.changes import OPTION_NAMES, check_movable, paused, resumed, upcoming
from llmtasks.checks import check_text, check_whole
from llmtasks.dispatch import run_of, station
from llmtasks.errors import ConfigurationError, TaskNotFoundError
from llmtasks.pausing import Pausing
from llmtasks.plan import rich
from llmtasks.registry import task_registry
from llmtasks.saving import SavedPlan
from llmtasks.states import ScheduleState
from llmtasks.store import cancelling, schedules
from llmtasks.store.runs import Run
from llmtasks.store.schedules import Schedule

#: Task has a method called ``list``, so its annotations cannot name the type.
Instants: TypeAlias = list[datetime]
Runs: TypeAlias = list[Run]
Tasks: TypeAlias = "list[Task]"


class Task(SavedPlan, Pausing):
    """One stored schedule. Nothing is stored before ``save``; the state and the times are what the last call read.

    What talks to the database has two names: ``save`` is for code on an event loop, ``save_sync`` for the rest.
    """

    # -- control

    def pause_sync(self, by: str | None = None) -> Self:
        """Fire no more until resumed; runs that exist go on.

        Args:
            by: Who wants that; the reason says so until the Task is resumed. Of a paused Task it stays who it was.

        Raises:
            ForbiddenTransitionError: The Task is cancelled or completed.
        """
        if by is not None:
            check_text("by", by, "a name of 1 to 200 characters")
        return self._move(ScheduleState.PAUSED, "pause", by)

    def resume_sync(self) -> Self:
        """Fire again from the next instant on; nothing that was missed runs. Raises as ``pause_sync`` does."""
        return self._move(ScheduleState.ACTIVE, "resume")

    def cancel_sync(self, reason: str = "its Task was cancelled") -> Self:
        """End the schedule and its unfinished runs for good; a run that has not started never will."""
        at = station()
        now = at.database.now()
        with at.database.transaction() as tx:
            row = self._read(tx, lock=True)
            if row.state is not ScheduleState.CANCELLED:
                ended = replace(row, state=ScheduleState.CANCELLED, next_run_at=None, paused_at=None, reason=reason)
                row = schedules.put(tx, ended, now)
            ids = cancelling.cancel_of_schedule(tx, row.id, now, reason)
        self._adopt(row)
        dispatch.announce_cancelled(at, ids)
        return self

    def execute_now_sync(self) -> Run:
        """Run the function now, in whatever state the Task is; its schedule does not move, no policy leaves it out.

        Returns:
            The run, which is stored and sent; of a unique function perhaps the one that is there already.

        Raises:
            DuplicateRunError: The function is unique and refuses a second run.
        """
        at = station()
        with at.database.reading() as connection:
            row = self._read(connection)
        return dispatch.dispatch(at, run_of(row, unique=task_registry.unique_of(row)))

    def backfill_sync(self, start: datetime, end: datetime, *, limit: int | None = None) -> Runs:
        """Run the function for each instant from ``start`` to ``end``, both included, that has no run.

        Also for one that a policy skipped, alone or as one of several. The runs say "backfill ..." and may wait:
        without ``max_instances`` one runs at a time (all at once with overlap "allow"). The schedule does not move.

        Args:
            start: A naive datetime is the machine's local time.
            end: Not after now.
            limit: How many runs may be opened; 1,000 where it is None.

        Returns:
            The new runs, earliest first.

        Raises:
            InvalidTriggerError: ``start`` or ``end`` is no datetime.
            InvalidOptionError: They are the wrong way round or in the future, or there would be more runs.
        """
        at = station()
        with at.database.reading() as connection:
            row = self._read(connection)
        return backfill.open_all(at, backfill.missing(at, row, start, end, limit))

    async def pause(self, by: str | None = None) -> Self:
        """As ``pause_sync``, in a thread."""
        return await asyncio.to_thread(self.pause_sync, by)

    async def resume(self) -> Self:
        """As ``resume_sync``, in a thread."""
        return await asyncio.to_thread(self.resume_sync)

    async def cancel(self, reason: str = "its Task was cancelled") -> Self:
        """As ``cancel_sync``, in a thread."""
        return await asyncio.to_thread(self.cancel_sync, reason)

    async def execute_now(self) -> Run:
        """As ``execute_now_sync``, in a thread."""
        return await asyncio.to_thread(self.execute_now_sync)

    async def backfill(self, start: datetime, end: datetime, *, limit: int | None = None) -> Runs:
        """As ``backfill_sync``, in a thread."""
        return await asyncio.to_thread(self.backfill_sync, start, end, limit=limit)

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
            return cls._from(schedules.get_one(connection, at.name, id_or_name))

    @classmethod
    def list_sync(
        cls,
        *,
        name: str | None = None,
        func_name: str | None = None,
        states: Iterable[ScheduleState | str] = (),
        limit: int | None = None,
    ) -> Tasks:
        """The app's Tasks, those declared in code included, by name."""
        check_whole("limit", limit, 0, None)
        at, wanted = station(), [ScheduleState(state) for state in states]
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
    ) -> Tasks:
        """As ``list_sync``, in a thread."""
        return await asyncio.to_thread(cls.list_sync, name=name, func_name=func_name, states=states, limit=limit)

    def next_runs(self, count: int = 5) -> Instants:
        """The next instants, UTC; of a Task that is not active those that it would have if it were resumed now."""
        check_whole("count", count, 0, 10_000)
        now = (at := station()).database.now()
        return upcoming(self._row or self._checked(at, now), now, count)

    # -- inside

    def _move(self, to: ScheduleState, verb: str, by: str | None = None) -> Self:
        at = station()
        now = at.database.now()
        with at.database.transaction() as tx:
            row = self._read(tx, lock=True)
            check_movable(row, verb)
            if row.state is not to or (to is ScheduleState.ACTIVE and row.next_run_at is None):
                row = schedules.put(tx, paused(row, now, by) if to is ScheduleState.PAUSED else resumed(row, now), now)
        self._adopt(row)
        return self

    def _read(self, tx: Any, *, lock: bool = False) -> Schedule:
        if self.id is None:
            raise ConfigurationError(f"Task {self.name or self.func_name!r} is not stored yet: call save() first")
        found = schedules.get(tx, self.id, lock=lock)
        if found is None:
            raise TaskNotFoundError(f"no Task has the id {self.id!r} any more")
        return found

    @classmethod
    def _from(cls, row: Schedule) -> Task:
        task = cls(
            func_name=row.func_name,
            params=rich(row.kwargs),
            scheduled_at=row.anchor if row.kind == "once" else None,
            interval_minutes=row.every_us / 60_000_000 if row.every_us else None,
            schedule=row.expression,
            **{name: row.options.get(name) for name in OPTION_NAMES},
        )
        task._adopt(row)
        return task
