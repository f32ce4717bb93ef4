"""TaskMonitor: what the ledger says about one Task or run, and about all of them, as frozen snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from llmtasks import sender
from llmtasks.dispatch import Station, station
from llmtasks.errors import InvalidParamsError
from llmtasks.states import CELERY_STATE, ENDED, RunState, ScheduleState
from llmtasks.store import processes, runs, schedules, statistics, totals
from llmtasks.store.processes import Process
from llmtasks.store.runs import Run
from llmtasks.store.schedules import Schedule
from llmtasks.store.statistics import Count, Distribution

#: The window of statistics where nobody says one.
DEFAULT_WINDOW: Final = timedelta(hours=24)
#: Distributions are of at most this many runs, the latest ones: enough for a p99, and read in a few milliseconds.
SAMPLE: Final = 5_000
#: A schedule that should have fired this long ago is overdue.
OVERDUE_AFTER: Final = timedelta(seconds=5)

#: Celery's states of a run that the ledger does not have, in our words.
_FROM_CELERY: Final = {
    **{celery: ours for ours, celery in CELERY_STATE.items() if ours not in {RunState.QUEUED, RunState.WAITING}},
    "RECEIVED": RunState.QUEUED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """Where a Task or a run stood when it was asked; instants are UTC.

    Attributes:
        kind: "task" for a stored schedule, "run" for one execution.
        id: The Task's or the run's id.
        state: A ``ScheduleState`` or a ``RunState``; of a run that only Celery knows, Celery's state in our words.
        reason: Why it is in that state, for people.
        next_run_at: The Task's next instant; the run's next attempt.
        last_run: The Task's newest run; the run itself.
        attempts: Attempts of the run, of the Task's newest run, that ended and count.
        error: One line: the last error of that run.
        celery_state: Celery's own word where the ledger does not know the id, else None.
    """

    kind: Literal["task", "run"]
    id: str
    name: str
    func_name: str
    state: ScheduleState | RunState | str
    reason: str | None = None
    next_run_at: datetime | None = None
    last_run: Run | None = None
    attempts: int = 0
    error: str | None = None
    celery_state: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionStatistics:
    """The share of one task function. ``run_seconds`` is the mean of all last attempts in the window."""

    func_name: str
    by_state: Mapping[RunState, int]
    total: int
    success_rate: float | None
    retries: int
    lost_attempts: int
    run_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """A worker or beat that is alive; CPU in percent of one core, memory in bytes, both with its children."""

    name: str
    pid: int
    pool: str | None
    concurrency: int | None
    started_at: datetime
    heartbeat_at: datetime
    cpu_percent: float | None
    memory: int | None

    @classmethod
    def of(cls, process: Process) -> ProcessStatus:
        """What people ask of a process."""
        return cls(**{name: getattr(process, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatistics:
    """The ledger in numbers: of runs that ended since ``since``, and of runs that are live now, whenever they began.

    Attributes:
        since: The window's begin.
        until: The instant of asking, by the database's clock.
        func_name: The task function it is limited to, if any.
        by_state: Runs by state; every state is there.
        running: Runs that a worker holds now.
        success_rate: succeeded / (succeeded + failed), 0 to 1; None where neither happened.
        throughput: Runs ended per minute of the window.
        wait: Seconds from recording to first start, of the latest 5,000 that succeeded or failed. A run of ``.delay()``
            is recorded by its first start, so its wait is not known and not counted.
        run_time: Seconds of the last attempt, of the same runs.
        retries: Attempts after the first.
        lost_attempts: Attempts that were lost with their worker.
        silent: Running runs whose worker has not stamped them within the lease; they are dispatched again.
        functions: The same by task function, by name.
        schedules: Schedules by state; every state is there.
        overdue: Schedules that should have fired more than five seconds ago.
        workers: Workers alive.
        beats: Beats alive.
    """

    since: datetime
    until: datetime
    func_name: str | None
    by_state: Mapping[RunState, int]
    total: int
    running: int
    success_rate: float | None
    throughput: float
    wait: Distribution
    run_time: Distribution
    retries: int
    lost_attempts: int
    silent: int
    functions: tuple[FunctionStatistics, ...]
    schedules: Mapping[ScheduleState, int]
    overdue: int
    workers: tuple[ProcessStatus, ...]
    beats: tuple[ProcessStatus, ...]


class TaskMonitor:
    """Reads the ledger of the current app."""

    @staticmethod
    def get_task_status_sync(task_id: str) -> TaskStatus:
        """Where a Task or a run stands. An id that nobody knows is ``pending``, which is all that Celery can say of it.

        Args:
            task_id: The id of a Task or of a run (Celery's task id).

        Raises:
            InvalidParamsError: ``task_id`` is no text.
            DatabaseUnavailableError: The ledger does not answer.
        """
        return _status(station(), task_id)

    @staticmethod
    async def get_task_status(task_id: str) -> TaskStatus:
        """As ``get_task_status_sync``, in a thread."""
        # The app that is current is the caller's thread's own.
        return await asyncio.to_thread(_status, station(), task_id)

    @staticmethod
    def get_statistics_sync(since: datetime | timedelta | None = None, func_name: str | None = None) -> TaskStatistics:
        """The ledger in numbers.

        Args:
            since: The window's begin, or its length up to now; defaults to 24 hours. A naive datetime is local time.
            func_name: Only this task function; schedules are limited too, workers are not.

        Raises:
            DatabaseUnavailableError: The ledger does not answer.
        """
        return _statistics(station(), since, func_name)

    @staticmethod
    async def get_statistics(since: datetime | timedelta | None = None, func_name: str | None = None) -> TaskStatistics:
        """As ``get_statistics_sync``, in a thread."""
        return await asyncio.to_thread(_statistics, station(), since, func_name)


def _status(at: Station, task_id: Any) -> TaskStatus:
    if not isinstance(task_id, str) or not task_id:
        raise InvalidParamsError(f"task_id={task_id!r}: expected the id of a Task or a run; a saved Task has one")
    with at.database.reading() as connection:
        schedule = schedules.get(connection, task_id)
        if schedule is not None:
            last = statistics.last_run_id(connection, schedule.id)
            return _of_schedule(schedule, runs.get(connection, last) if last else None)
        run = runs.get(connection, task_id)
    return _of_run(run) if run is not None else _of_celery(at, task_id)


def _of_schedule(schedule: Schedule, last: Run | None) -> TaskStatus:
    return TaskStatus(
        kind="task",
        id=schedule.id,
        name=schedule.name,
        func_name=schedule.func_name,
        state=schedule.state,
        reason=schedule.reason,
        next_run_at=schedule.next_run_at,
        last_run=last,
        attempts=last.attempts if last else 0,
        error=last.error if last else None,
    )


def _of_run(run: Run) -> TaskStatus:
    return TaskStatus(
        kind="run",
        id=run.id,
        name=run.name,
        func_name=run.func_name,
        state=run.state,
        reason=run.reason,
        next_run_at=run.next_attempt_at if run.state is RunState.RETRYING else None,
        last_run=run,
        attempts=run.attempts,
        error=run.error,
    )


def _of_celery(at: Station, run_id: str) -> TaskStatus:
    found = sender.celery_state(at.app, run_id)
    reason = f"not in the ledger (yet); Celery says {found}"
    if found == "PENDING":
        reason += ", as it does of every id that it does not know"
    state = _FROM_CELERY.get(found, found)
    return TaskStatus(kind="run", id=run_id, name="", func_name="", state=state, reason=reason, celery_state=found)


def _statistics(at: Station, since: datetime | timedelta | None, func_name: str | None) -> TaskStatistics:
    now = at.database.now()
    begin = _begin(since, now)
    with at.database.reading() as connection:
        finished = totals.ended(connection, at.name, begin, func_name)
        live = statistics.live(connection, at.name, func_name)
        times = statistics.latest(connection, at.name, begin, func_name, SAMPLE)
        silent = statistics.silent(connection, at.name, now - at.settings.lease_time, func_name)
        by_state = statistics.schedules_by_state(connection, at.name, func_name)
        overdue = statistics.overdue(connection, at.name, now - OVERDUE_AFTER, func_name)
        alive = processes.alive(connection, at.name, now - at.settings.lease_time)
    counts = [*finished, *live]
    minutes = (now - begin).total_seconds() / 60
    states = _by_state(counts)
    return TaskStatistics(
        since=begin,
        until=now,
        func_name=func_name,
        by_state=states,
        total=sum(states.values()),
        running=states[RunState.RUNNING],
        success_rate=_success_rate(states),
        throughput=sum(states[state] for state in ENDED) / minutes if minutes > 0 else 0.0,
        wait=times.wait,
        run_time=times.run_time,
        retries=sum(item.retries for item in counts),
        lost_attempts=sum(item.losses for item in counts),
        silent=silent,
        functions=tuple(_function(name, counts) for name in sorted({item.func_name for item in counts})),
        schedules={state: by_state.get(state, 0) for state in ScheduleState},
        overdue=overdue,
        workers=tuple(ProcessStatus.of(item) for item in alive if item.kind == "worker"),
        beats=tuple(ProcessStatus.of(item) for item in alive if item.kind == "beat"),
    )


def _begin(since: datetime | timedelta | None, now: datetime) -> datetime:
    if since is None:
        return now - DEFAULT_WINDOW
    return now - since if isinstance(since, timedelta) else since.astimezone(now.tzinfo)


def _by_state(counts: Iterable[Count]) -> dict[RunState, int]:
    found = dict.fromkeys(RunState, 0)
    for item in counts:
        found[item.state] += item.runs
    return found


def _success_rate(states: Mapping[RunState, int]) -> float | None:
    succeeded, failed = states[RunState.SUCCEEDED], states[RunState.FAILED]
    return succeeded / (succeeded + failed) if succeeded + failed else None


def _function(name: str, counts: Iterable[Count]) -> FunctionStatistics:
    mine = [item for item in counts if item.func_name == name]
    states = _by_state(mine)
    timed = sum(item.timed for item in mine)
    return FunctionStatistics(
        func_name=name,
        by_state=states,
        total=sum(states.values()),
        success_rate=_success_rate(states),
        retries=sum(item.retries for item in mine),
        lost_attempts=sum(item.losses for item in mine),
        run_seconds=sum(item.run_seconds for item in mine) / timed if timed else None,
    )
