"""Overlap policies with two real beats and a worker: what starts beside what, and what the ledger says."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from llmtasks import Run, Task
from llmtasks.dispatch import station
from llmtasks.policies import Policies
from llmtasks.states import LIVE, RunState
from llmtasks.store import runs
from tests.ledger import QUICK, Ledger, project_with
from tests.processes import Project
from tests.waiting import wait_until

TASKS = """
    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="work", max_retries=0)
    async def work(key):
        note(key, "+")
        try:
            await gate(key)
        finally:
            note(key, "-")


    @task_registry.register(name="declared", max_retries=0, interval_minutes=0.4 / 60, overlap="skip", max_runs=3)
    async def declared():
        note("declared", "ran")
"""

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with project_with(tmp_path_factory.mktemp("overlap"), TASKS, **QUICK) as project:
        project.worker(concurrency=6)
        for beat in (project.beat(), project.beat()):
            beat.wait_for_log("schedules are declared in code")
        assert project.app
        yield project


@pytest.fixture(scope="module")
def ledger(project: Project) -> Ledger:
    return Ledger(project)


def often(overlap: str, **options: Any) -> Task:
    """A Task of every 0.4 seconds, whose runs wait at the gate of the policy's name."""
    return Task(
        func_name="work", name=overlap, params={"key": overlap}, interval_minutes=0.4 / 60, overlap=overlap, **options
    ).save_sync()


def runs_of(task: Task) -> list[Run]:
    """The runs of a Task's instants, earliest first."""
    with station().database.reading() as connection:
        found = runs.find(connection, station().name, schedule_id=task.id, limit=1_000)
    return sorted(found, key=lambda run: run.scheduled_for or run.created_at)


def until(task: Task, state: RunState, count: int, what: str) -> list[Run]:
    """The Task's runs in a state, once there are so many."""

    def found() -> list[Run]:
        return [run for run in runs_of(task) if run.state is state]

    wait_until(lambda: len(found()) >= count, 60, what)
    return found()


def at_once(marks: list[str]) -> int:
    """How many ran side by side at most."""
    return max(marks[:end].count("+") - marks[:end].count("-") for end in range(len(marks) + 1))


def test_skip_starts_no_run_beside_an_unfinished_one(ledger: Ledger) -> None:
    """Each instant meanwhile is skipped and names the run; when that has ended the next instant runs."""
    task = often("skip")
    (first,) = until(task, RunState.RUNNING, 1, "one runs")

    skipped = until(task, RunState.SKIPPED, 3, "three are skipped")
    assert len([run for run in runs_of(task) if run.state in LIVE]) == 1
    ledger.open_gate("skip")
    until(task, RunState.SUCCEEDED, 3, "others run")
    task.pause_sync()

    instant = first.scheduled_for.isoformat() if first.scheduled_for else ""
    assert {run.reason for run in skipped[1:]} == {f"overlap policy skip: run {first.id} ({instant}) is running"}
    assert at_once(ledger.notes_now("skip")) == 1


def test_queue_one_lets_one_run_wait_and_skips_the_others(ledger: Ledger) -> None:
    """It starts when the first has ended, and never beside it."""
    task = often("queue_one")
    (first,) = until(task, RunState.RUNNING, 1, "one runs")
    (second,) = until(task, RunState.WAITING, 1, "one waits")

    skipped = until(task, RunState.SKIPPED, 2, "two are skipped")
    task.pause_sync()
    assert second.reason == "the only slot of schedule 'queue_one' was taken"
    ledger.open_gate("queue_one")

    assert ledger.ends(first.id).state is ledger.ends(second.id).state is RunState.SUCCEEDED
    assert (skipped[-1].reason or "").startswith(f"overlap policy queue_one: run {first.id} (")
    assert (skipped[-1].reason or "").endswith(") is running, and another waits already")
    assert at_once(ledger.notes_now("queue_one")) == 1


def test_allow_starts_runs_side_by_side_up_to_max_instances(ledger: Ledger) -> None:
    """Beyond the places an instant is skipped by the worker that finds none."""
    task = often("allow", max_instances=2)
    running = until(task, RunState.RUNNING, 2, "two run")

    skipped = until(task, RunState.SKIPPED, 1, "one finds no place")
    task.pause_sync()
    ledger.open_gate("allow")

    assert skipped[0].reason == "all 2 slots of schedule 'allow' were taken"
    assert {ledger.ends(run.id).state for run in running} == {RunState.SUCCEEDED}
    assert at_once(ledger.notes_now("allow")) == 2


def test_cancel_running_gives_the_place_to_the_newest_run(ledger: Ledger) -> None:
    """The run before is cancelled and says for which; the new one starts when it has really ended."""
    task = often("cancel_running")
    cancelled = until(task, RunState.CANCELLED, 3, "three were cancelled")
    task.pause_sync()
    ledger.open_gate("cancel_running")
    wait_until(lambda: not any(run.state in LIVE for run in runs_of(task)), 60, "all have ended")

    found = runs_of(task)
    newer = {run.id: found[index + 1] for index, run in enumerate(found[:-1])}
    for run in cancelled:
        instant = newer[run.id].scheduled_for
        taken = f"run {newer[run.id].id} ({instant.isoformat() if instant else ''}) takes its place"
        assert run.reason == f"overlap policy cancel_running: {taken}"
    assert found[-1].state is RunState.SUCCEEDED
    assert at_once(ledger.notes_now("cancel_running")) == 1


def test_jitter_delays_the_start_and_not_the_instant(ledger: Ledger) -> None:
    """Each run starts after its instant by its own part of ``jitter_seconds``, and ends as usual."""
    ledger.open_gate("jittered")
    policies = Policies.of({"jitter_seconds": 1.5})
    task = Task(
        func_name="work", name="jittered", params={"key": "jittered"}, interval_minutes=2 / 60, jitter_seconds=1.5,
        max_runs=2,
    ).save_sync()  # fmt: skip

    for run in until(task, RunState.SUCCEEDED, 2, "both run"):
        assert run.started_at is not None
        assert run.scheduled_for is not None
        assert run.started_at - run.scheduled_for >= policies.jitter_of(run.id) > timedelta()
    assert task.next_run_at is not None
    assert runs_of(task)[0].scheduled_for == task.next_run_at


def test_a_declared_schedule_ends_with_its_max_runs(ledger: Ledger) -> None:
    """As often as it says, with its reason."""

    def declared() -> Task:
        return Task.get_sync("declared")

    wait_until(lambda: declared().state == "completed", 60, "it is completed")

    assert (declared().reason, declared().fired) == ("max_runs: it had all of its 3", 3)
    assert len(ledger.notes("declared", 3)) == 3


def test_backfilled_runs_run_one_at_a_time(ledger: Ledger) -> None:
    """In the order of their instants, while the schedule is paused."""
    task = Task(
        func_name="work", name="filled", params={"key": "filled"}, schedule="* * * * *", timezone="UTC"
    ).save_sync()  # fmt: skip
    task.pause_sync()
    ledger.open_gate("filled")
    noon = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)

    opened = task.backfill_sync(noon, noon + timedelta(minutes=4))

    ended = [ledger.ends(run.id) for run in opened]
    assert {run.state for run in ended} == {RunState.SUCCEEDED}
    assert len(ended) == 5
    assert at_once(ledger.notes_now("filled")) == 1
