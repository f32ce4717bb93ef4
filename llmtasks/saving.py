"""Saving: plans become rows, one or many in one transaction; what is stored is shown on them."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Self, TypeVar

from llmtasks.changes import begun, saved_over
from llmtasks.dispatch import station
from llmtasks.errors import ConfigurationError, LLMTasksError
from llmtasks.plan import Plan
from llmtasks.states import ScheduleState
from llmtasks.store import schedules
from llmtasks.store.joining import joined
from llmtasks.store.schedules import Schedule

P = TypeVar("P", bound="SavedPlan")


@dataclass(kw_only=True, eq=False)
class SavedPlan(Plan):
    """A plan that can be stored, and what the row says.

    Attributes:
        state: Active, paused, completed or cancelled; None before the first ``save``.
        reason: Who paused it, why it completed, was cancelled, or was set aside by beat.
        paused_at: Since when it is paused.
        last_run_at: The latest instant that was dispatched.
        fired: How many runs its instants got; ``max_runs`` limits it.
        created_at: When it was saved first.
        updated_at: When it was changed last.
    """

    state: ScheduleState | None = field(default=None, init=False)
    reason: str | None = field(default=None, init=False)
    paused_at: datetime | None = field(default=None, init=False)
    last_run_at: datetime | None = field(default=None, init=False)
    fired: int = field(default=0, init=False)
    created_at: datetime | None = field(default=None, init=False)
    updated_at: datetime | None = field(default=None, init=False)

    def save_sync(self, session: Any = None) -> Self:
        """Store the Task, new or changed; it takes effect at once.

        The next run moves only if the trigger or ``starts_at`` changed. A completed Task whose ``ends_at`` or
        ``max_runs`` leaves it more runs now goes on.

        Args:
            session: A SQLAlchemy Session on llmtasks' database: the Task is stored by the session's own transaction.

        Raises:
            UnknownTaskFunctionError: No function is registered as ``func_name``.
            InvalidParamsError: ``params`` do not fit its signature, or JSON cannot carry them.
            InvalidTriggerError: There is no trigger or more than one, it is not readable, or it never fires.
            InvalidOptionError: An option has a value that it cannot have.
            ForbiddenTransitionError: The Task is cancelled, or code declares it and this would change what code says.
            ConfigurationError: The session is on another database.
        """
        self._save_all([self], session)
        return self

    async def save(self, session: Any = None) -> Self:
        """As ``save_sync``, in a thread; ``session`` may be an AsyncSession."""
        await self._save_aside([self], session)
        return self

    @staticmethod
    def save_many_sync(tasks: Iterable[P], session: Any = None) -> list[P]:
        """Store Tasks, new or changed, in one transaction: all of them, or none where one is refused.

        Args:
            tasks: Each of them once.
            session: As of ``save_sync``.

        Returns:
            The same Tasks in their order.

        Raises:
            LLMTasksError: What ``save_sync`` raises; its message begins with the place of the Task, "tasks[3]: ".
        """
        listed = list(tasks)
        SavedPlan._save_all(listed, session, named=True)
        return listed

    @staticmethod
    async def save_many(tasks: Iterable[P], session: Any = None) -> list[P]:
        """As ``save_many_sync``, in a thread; ``session`` may be an AsyncSession."""
        listed = list(tasks)
        await SavedPlan._save_aside(listed, session, named=True)
        return listed

    def _adopt(self, row: Schedule) -> None:
        """Show what the row says."""
        self.id, self.name, self.state, self.reason = row.id, row.name, row.state, row.reason
        self.next_run_at, self.last_run_at, self.fired = row.next_run_at, row.last_run_at, row.fired
        self.starts_at, self.ends_at, self.timezone = row.starts_at, row.ends_at, row.timezone
        self.created_at, self.updated_at, self.paused_at = row.created_at, row.updated_at, row.paused_at
        self._row = row

    @staticmethod
    async def _save_aside(plans: Sequence[SavedPlan], session: Any, *, named: bool = False) -> None:
        if session is None:
            await asyncio.to_thread(SavedPlan._save_all, plans, named=named)
        elif hasattr(session, "run_sync"):
            await session.run_sync(partial(SavedPlan._save_all, plans, named=named))
        else:
            SavedPlan._save_all(plans, session, named=named)

    @staticmethod
    def _save_all(plans: Sequence[SavedPlan], session: Any = None, *, named: bool = False) -> None:
        at = station()
        now = at.database.now()
        places: dict[int, int] = {}
        checked: list[Schedule] = []
        for place, plan in enumerate(plans):
            with _naming(place, named=named):
                if places.setdefault(id(plan), place) != place:
                    raise ConfigurationError(f"expected each Task once, and this is tasks[{places[id(plan)]}] too")
                checked.append(plan._checked(at, now))
        if session is not None:
            rows = SavedPlan._write_all(joined(at.database, session), plans, checked, now, named=named)
        else:
            with at.database.transaction() as tx:
                rows = SavedPlan._write_all(tx, plans, checked, now, named=named)
        for plan, row in zip(plans, rows, strict=True):
            plan._adopt(row)

    @staticmethod
    def _write_all(
        tx: Any, plans: Sequence[SavedPlan], checked: Sequence[Schedule], now: datetime, *, named: bool
    ) -> list[Schedule]:
        """Write checked rows, beside what the rows that are there keep; new ones many in one statement."""
        rows: dict[int, Schedule] = {}
        new: dict[int, Schedule] = {}
        for place, (plan, wanted) in enumerate(zip(plans, checked, strict=True)):
            with _naming(place, named=named):
                before = schedules.get(tx, wanted.id, lock=True) if plan.id else None
                if before is not None:
                    moved = plan._asks_for_next_run
                    rows[place] = schedules.put(tx, saved_over(before, wanted, moved=moved, now=now), now)
                elif plan.id:
                    rows[place] = schedules.put(tx, begun(wanted, now), now)
                else:
                    new[place] = begun(wanted, now)
        rows |= zip(new, schedules.put_many(tx, list(new.values()), now), strict=True)
        return [rows[place] for place in range(len(plans))]


@contextmanager
def _naming(place: int, *, named: bool) -> Generator[None]:
    """Have an error say which of several Tasks it is about."""
    try:
        yield
    except LLMTasksError as error:
        if named:
            error.args = (f"tasks[{place}]: {error}", *error.args[1:])
        raise
