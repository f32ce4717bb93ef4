"""The ledger in numbers: counted are the runs that ended in the window and those that are live now."""

import asyncio
import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import celery._state
import pytest
from celery import Celery

from llmtasks.dispatch import Station, station
from llmtasks.errors import InvalidParamsError
from llmtasks.monitor import TaskMonitor, TaskStatistics
from llmtasks.states import RunState, ScheduleState
from llmtasks.store import processes, schedules, statistics
from llmtasks.store.processes import Process
from llmtasks.store.rows import runs
from llmtasks.store.schedules import Schedule
from llmtasks.store.statistics import Distribution


@pytest.fixture
def at(database_url: str) -> Iterator[Station]:
    """An app on an empty ledger, current in this test's thread only."""
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.llmtasks_database_url = database_url
    tls: Any = celery._state._tls  # type: ignore[attr-defined]
    before, tls.current_app = tls.current_app, app
    found = station(app)
    if not found.database.is_sqlite:
        found.database.migrate()
    yield found
    tls.current_app = before
    found.database.close()
    app.close()


class Ledger:
    """Writes rows as they would be after whatever led to them."""

    def __init__(self, at: Station) -> None:
        self.at = at
        self.now = at.database.now()
        self._count = 0

    def run(self, state: RunState, func_name: str = "add", ago: float = 60, **columns: Any) -> str:
        """A run that ended ``ago`` seconds ago, or began then where it is live."""
        self._count += 1
        instant = self.now - timedelta(seconds=ago)
        row = {
            "id": f"run-{self._count}",
            "app": self.at.name,
            "func_name": func_name,
            "name": func_name,
            "state": state,
            "priority": 5,
            "created_at": instant,
            "delivered": state.is_final,
            "ended_at": instant if state.is_final else None,
            "attempts": int(state in {RunState.SUCCEEDED, RunState.FAILED}),
            **columns,
        }
        with self.at.database.transaction() as tx:
            tx.execute(runs.insert().values(row))
        return str(row["id"])

    def schedule(self, state: ScheduleState, next_run_in: float | None = None, **columns: Any) -> Schedule:
        """A stored schedule."""
        self._count += 1
        following = None if next_run_in is None else self.now + timedelta(seconds=next_run_in)
        fields = {"name": "nightly", "func_name": "add", "kind": "cron", "expression": "0 0 * * *", "timezone": "UTC"}
        new = Schedule(
            id=f"schedule-{self._count}", app=self.at.name, state=state, next_run_at=following, **{**fields, **columns}
        )
        with self.at.database.transaction() as tx:
            return schedules.put(tx, new, self.now)

    def process(self, kind: str, name: str, silent_for: float = 0) -> None:
        """A worker or beat that stamped its row so many seconds ago."""
        stamped = self.now - timedelta(seconds=silent_for)
        process = Process(
            id=name, app=self.at.name, kind=kind, name=name, pid=4711, pool="prefork", concurrency=4,
            started_at=stamped, heartbeat_at=stamped, cpu_percent=12.5, memory=100_000_000,
        )  # fmt: skip
        with self.at.database.transaction() as tx:
            processes.stamp(tx, process)


@pytest.fixture
def ledger(at: Station) -> Ledger:
    return Ledger(at)


def test_empty_ledger_has_zeros_and_no_rates(at: Station) -> None:
    """Every state is there with zero; what cannot be said is None."""
    found = TaskMonitor.get_statistics_sync()

    assert found.by_state == dict.fromkeys(RunState, 0)
    assert found.schedules == dict.fromkeys(ScheduleState, 0)
    assert (found.total, found.success_rate, found.throughput) == (0, None, 0.0)
    assert found.wait == found.run_time == Distribution()
    assert found.functions == found.workers == found.beats == ()


def test_window_counts_what_ended_in_it_and_all_that_is_live(ledger: Ledger) -> None:
    """A run that ended before the window is left out; one that is live counts however old it is."""
    ledger.run(RunState.SUCCEEDED, ago=60)
    ledger.run(RunState.FAILED, ago=60)
    ledger.run(RunState.SUCCEEDED, ago=7_200)
    ledger.run(RunState.WAITING, ago=90_000)
    ledger.run(RunState.RUNNING, ago=90_000, heartbeat_at=ledger.now)

    found = TaskMonitor.get_statistics_sync(since=timedelta(hours=1))

    counts = {state: count for state, count in found.by_state.items() if count}
    assert counts == {RunState.SUCCEEDED: 1, RunState.FAILED: 1, RunState.WAITING: 1, RunState.RUNNING: 1}
    assert (found.total, found.running) == (4, 1)
    assert found.success_rate == 0.5
    assert found.throughput == pytest.approx(2 / 60, rel=0.01)


def test_default_window_is_a_day(ledger: Ledger) -> None:
    """Without ``since`` the last 24 hours count."""
    ledger.run(RunState.SUCCEEDED, ago=23 * 3_600)
    ledger.run(RunState.SUCCEEDED, ago=25 * 3_600)

    assert TaskMonitor.get_statistics_sync().total == 1


def test_since_is_an_instant_too_and_a_naive_one_is_local_time(ledger: Ledger) -> None:
    """What ``datetime.now()`` gives means the machine's zone."""
    ledger.run(RunState.SUCCEEDED, ago=60)

    recent = datetime.now() - timedelta(minutes=5)

    assert TaskMonitor.get_statistics_sync(since=recent).total == 1
    assert TaskMonitor.get_statistics_sync(since=recent.astimezone(UTC)).total == 1
    assert TaskMonitor.get_statistics_sync(since=datetime.now()).total == 0


def test_skipped_and_cancelled_runs_do_not_count_for_the_success_rate(ledger: Ledger) -> None:
    """Neither succeeded nor failed."""
    for state in (RunState.SUCCEEDED, RunState.SKIPPED, RunState.CANCELLED):
        ledger.run(state)

    assert TaskMonitor.get_statistics_sync().success_rate == 1.0


def test_wait_is_from_recording_to_first_start_where_it_is_known(ledger: Ledger) -> None:
    """A run recorded by its first start (``.delay()``) says nothing about waiting."""
    begin = ledger.now - timedelta(minutes=10)
    for seconds in (1, 2, 3):
        ledger.run(RunState.SUCCEEDED, created_at=begin, started_at=begin + timedelta(seconds=seconds))
    ledger.run(RunState.SUCCEEDED, created_at=begin, started_at=begin)

    wait = TaskMonitor.get_statistics_sync().wait

    assert (wait.count, wait.p50) == (3, pytest.approx(2.0))
    assert wait.mean == pytest.approx(2.0)


def test_run_time_has_mean_and_percentiles(ledger: Ledger) -> None:
    """1 to 100 seconds: the percentiles lie where they should."""
    for seconds in range(1, 101):
        ledger.run(RunState.SUCCEEDED, run_seconds=float(seconds))
    ledger.run(RunState.CANCELLED, run_seconds=10_000.0)

    run_time = TaskMonitor.get_statistics_sync().run_time

    assert run_time.count == 100
    assert run_time.mean == pytest.approx(50.5)
    assert run_time.p50 == pytest.approx(50.5)
    assert run_time.p95 == pytest.approx(95.05)
    assert run_time.p99 == pytest.approx(99.01)


def test_distribution_is_of_the_latest_runs(ledger: Ledger) -> None:
    """Of more runs than the sample has, the newest count."""
    for ago in range(10):
        ledger.run(RunState.SUCCEEDED, ago=ago, run_seconds=float(ago))

    with ledger.at.database.reading() as connection:
        times = statistics.latest(connection, ledger.at.name, ledger.now - timedelta(hours=1), None, 3)

    assert times.run_time.count == 3
    assert times.run_time.mean == pytest.approx(1.0)


def test_retries_and_lost_attempts_are_summed(ledger: Ledger) -> None:
    """Attempts after the first, and those lost with their worker, of ended and live runs."""
    ledger.run(RunState.SUCCEEDED, attempts=1)
    ledger.run(RunState.FAILED, attempts=4, losses=1)
    ledger.run(RunState.RETRYING, attempts=2, losses=2)

    found = TaskMonitor.get_statistics_sync()

    assert (found.retries, found.lost_attempts) == (4, 3)


def test_each_function_has_its_share(ledger: Ledger) -> None:
    """By name, with its own states, rate, retries and mean run time; ``func_name`` limits everything to one."""
    ledger.run(RunState.SUCCEEDED, "add", run_seconds=1.0)
    ledger.run(RunState.SUCCEEDED, "add", run_seconds=3.0)
    ledger.run(RunState.FAILED, "report", attempts=3, run_seconds=5.0)
    ledger.run(RunState.QUEUED, "report")

    add, report = TaskMonitor.get_statistics_sync().functions
    only = TaskMonitor.get_statistics_sync(func_name="report")

    assert (add.func_name, add.total, add.success_rate, add.run_seconds) == ("add", 2, 1.0, 2.0)
    assert (report.func_name, report.total, report.success_rate, report.retries) == ("report", 2, 0.0, 2)
    assert only.functions == (report,)
    assert (only.func_name, only.total, only.run_time.mean) == ("report", 2, 5.0)


def test_other_apps_in_the_database_do_not_count(ledger: Ledger) -> None:
    """Runs, schedules and processes are the app's own."""
    ledger.run(RunState.SUCCEEDED, app="another")
    ledger.run(RunState.RUNNING, app="another")
    with ledger.at.database.transaction() as tx:
        other = Schedule(id="other", app="another", name="x", func_name="x", kind="cron", expression="@daily")
        schedules.put(tx, other, ledger.now)

    found = TaskMonitor.get_statistics_sync()

    assert found.total == 0
    assert sum(found.schedules.values()) == 0


def test_running_runs_that_nobody_stamps_are_silent(ledger: Ledger) -> None:
    """Within the lease a worker is trusted, after it the run is to be dispatched again."""
    ledger.run(RunState.RUNNING, heartbeat_at=ledger.now)
    ledger.run(RunState.RUNNING, heartbeat_at=ledger.now - timedelta(seconds=60))

    assert TaskMonitor.get_statistics_sync().silent == 1
    assert TaskMonitor.get_statistics_sync(func_name="report").silent == 0


def test_schedules_are_counted_by_state_and_overdue_ones_apart(ledger: Ledger) -> None:
    """A schedule is overdue five seconds after its instant."""
    ledger.schedule(ScheduleState.ACTIVE, next_run_in=60)
    ledger.schedule(ScheduleState.ACTIVE, next_run_in=-60)
    ledger.schedule(ScheduleState.PAUSED, func_name="report")

    found = TaskMonitor.get_statistics_sync()

    assert {state: count for state, count in found.schedules.items() if count} == {"active": 2, "paused": 1}
    assert found.overdue == 1
    assert TaskMonitor.get_statistics_sync(func_name="report").overdue == 0
    assert TaskMonitor.get_statistics_sync(func_name="report").schedules[ScheduleState.PAUSED] == 1


def test_workers_and_beats_that_stamped_within_the_lease_are_alive(ledger: Ledger) -> None:
    """With their name, CPU and memory; one that is silent is not alive."""
    ledger.process("worker", "worker-1@host")
    ledger.process("worker", "worker-2@host", silent_for=60)
    ledger.process("beat", "beat@host")

    found = TaskMonitor.get_statistics_sync()

    (worker,) = found.workers
    assert (worker.name, worker.pid, worker.cpu_percent, worker.memory) == ("worker-1@host", 4711, 12.5, 100_000_000)
    assert [beat.name for beat in found.beats] == ["beat@host"]


async def test_statistics_are_read_by_several_coroutines_at_once(ledger: Ledger) -> None:
    """The async twins read in threads, for the caller's app."""
    ledger.run(RunState.SUCCEEDED)

    found = await asyncio.gather(*(TaskMonitor.get_statistics() for _ in range(3)))

    assert [item.total for item in found] == [1, 1, 1]


def test_snapshot_is_frozen(at: Station) -> None:
    """Nobody can change what was read."""
    found: TaskStatistics = TaskMonitor.get_statistics_sync()

    with pytest.raises(dataclasses.FrozenInstanceError):
        found.total = 1  # type: ignore[misc]


def test_status_of_a_task_has_its_newest_run(ledger: Ledger) -> None:
    """State and next instant are the schedule's, attempts and error the newest run's."""
    schedule = ledger.schedule(ScheduleState.ACTIVE, next_run_in=60)
    ledger.run(RunState.SUCCEEDED, ago=120, schedule_id=schedule.id)
    newest = ledger.run(RunState.FAILED, ago=60, schedule_id=schedule.id, attempts=4, error="ValueError: no")

    status = TaskMonitor.get_task_status_sync(schedule.id)

    assert (status.kind, status.name, status.func_name, status.state) == ("task", "nightly", "add", "active")
    assert status.next_run_at == schedule.next_run_at
    assert status.last_run is not None
    assert (status.last_run.id, status.attempts, status.error) == (newest, 4, "ValueError: no")


def test_status_of_a_task_without_runs_has_none(ledger: Ledger) -> None:
    """Nothing has run yet."""
    schedule = ledger.schedule(ScheduleState.PAUSED)

    status = TaskMonitor.get_task_status_sync(schedule.id)

    assert (status.state, status.last_run, status.attempts, status.next_run_at) == ("paused", None, 0, None)


async def test_status_of_a_run_says_when_it_is_tried_again(ledger: Ledger) -> None:
    """A run between two attempts has a next one; one that is over has none."""
    again = ledger.now + timedelta(seconds=300)
    retrying = ledger.run(RunState.RETRYING, attempts=1, next_attempt_at=again, reason="attempt 1 ended", error="E: x")
    done = ledger.run(RunState.SUCCEEDED, next_attempt_at=again)

    status = await TaskMonitor.get_task_status(retrying)

    assert (status.kind, status.state, status.attempts, status.error) == ("run", "retrying", 1, "E: x")
    assert (status.reason, status.next_run_at) == ("attempt 1 ended", again)
    assert (await TaskMonitor.get_task_status(done)).next_run_at is None


def test_run_that_only_celery_knows_has_celerys_state(at: Station) -> None:
    """In our words, with Celery's own beside them."""
    at.app.backend.store_result("known-to-celery", {"x": 1}, "SUCCESS")

    status = TaskMonitor.get_task_status_sync("known-to-celery")

    assert (status.kind, status.state, status.celery_state) == ("run", RunState.SUCCEEDED, "SUCCESS")


def test_id_that_nobody_knows_is_pending_and_says_so(at: Station) -> None:
    """Celery says PENDING of a run that it was just sent, and of any other id."""
    status = TaskMonitor.get_task_status_sync("never-heard-of")

    assert (status.state, status.celery_state) == (RunState.PENDING, "PENDING")
    assert "does not know" in (status.reason or "")


def test_task_that_was_not_saved_has_no_status(at: Station) -> None:
    """Its id is None, which is said."""
    unsaved: Any = None

    with pytest.raises(InvalidParamsError, match="a saved Task has one"):
        TaskMonitor.get_task_status_sync(unsaved)
