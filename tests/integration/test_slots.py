"""max_instances: never more runs at once, on-demand runs wait for a slot, periodic ones are skipped."""

from collections.abc import Iterator
from typing import Any

import pytest

from llmtasks import Task
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, project_with
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import asyncio
    import time

    from llmtasks import task_registry
    from tests.notebook import gate, note, notes


    @task_registry.register(name="alone", max_retries=0, max_instances=1)
    async def alone(name):
        note("alone", name)
        await gate(name)
        return name


    @task_registry.register(name="pair", max_retries=0, max_instances=2)
    def pair(number):
        note("pair", "+")
        note("together", notes("pair").count("+") - notes("pair").count("-"))
        time.sleep(0.05)
        note("pair", "-")


    @task_registry.register(name="free", max_retries=0)
    async def free(name):
        note("free", name)
        await gate(name)


    @task_registry.register(name="dies_alone", bind=True, queue="deadly", max_retries=2, retry_delay=0, max_instances=1)
    def dies_alone(self):
        import os, signal
        note("dies_alone", self.request.id)
        if len(notes("dies_alone")) == 1:
            os.kill(os.getpid(), signal.SIGKILL)


    @task_registry.register(name="fails_alone", max_retries=1, retry_delay=0, max_instances=1)
    def fails_alone(name):
        note("fails_alone", name)
        raise ValueError(name)
"""

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with project_with(tmp_path_factory.mktemp("slots"), TASKS, **QUICK) as project:
        yield project


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    return project.worker(concurrency=4)


def test_run_on_demand_waits_and_starts_when_a_slot_is_free(tasks: Any, ledger: Ledger) -> None:
    """It is waiting, with a reason, and goes on within a second of the end of the one before it."""
    first = tasks["alone"].delay("a1")
    ledger.becomes(first.id, RunState.RUNNING)
    second = tasks["alone"].delay("a2")

    run = ledger.becomes(second.id, RunState.WAITING)
    assert run.reason == "the only slot of function 'alone' was taken"
    assert run.started_at is None
    ledger.open_gate("a1")
    ledger.open_gate("a2")

    assert first.get(timeout=60) == "a1"
    assert second.get(timeout=60) == "a2"
    run = ledger.ends(second.id)
    assert (run.state, run.attempts, run.reason) == (RunState.SUCCEEDED, 1, None)


def test_waiting_runs_start_by_priority_then_age(tasks: Any, ledger: Ledger) -> None:
    """A freed slot goes to the first in line."""
    holder = tasks["alone"].delay("p0")
    ledger.becomes(holder.id, RunState.RUNNING)
    waiting = [
        tasks["alone"].apply_async((f"p{number}",), priority=priority)
        for number, priority in ((1, 9), (2, 5), (3, 1), (4, 5))
    ]
    for result in waiting:
        ledger.becomes(result.id, RunState.WAITING)

    for number in range(5):
        ledger.open_gate(f"p{number}")

    for result in waiting:
        ledger.ends(result.id)
    assert [name for name in ledger.notes_now("alone") if name.startswith("p")] == ["p0", "p3", "p2", "p4", "p1"]


def test_limit_is_never_exceeded(tasks: Any, ledger: Ledger) -> None:
    """Twenty runs, four processes, two slots: never three at once, and all of them end."""
    results = tasks["pair"].map_delay(range(20))

    for result in results:
        assert ledger.ends(result.id, 120).state is RunState.SUCCEEDED
    assert set(map(int, ledger.notes_now("together"))) <= {1, 2}


def test_failed_attempt_gives_its_slot_back(tasks: Any, ledger: Ledger) -> None:
    """Attempts of two runs take turns; each run has both of its own."""
    results = [tasks["fails_alone"].delay(name) for name in ("x", "y")]

    for result in results:
        assert ledger.ends(result.id).attempts == 2
    assert sorted(ledger.notes_now("fails_alone")) == ["x", "x", "y", "y"]


def test_slot_of_a_killed_process_is_free_again(project: Project, tasks: Any, ledger: Ledger) -> None:
    """A child that was killed while it held the only slot holds it no more."""
    worker = project.worker("-Q", "deadly", pool="prefork")
    results = [tasks["dies_alone"].delay(), tasks["dies_alone"].delay()]

    for result in results:
        assert ledger.ends(result.id).state is RunState.SUCCEEDED
    assert len(ledger.notes_now("dies_alone")) == 3
    worker.terminate()


def test_limit_of_a_task_is_its_own(tasks: Any, ledger: Ledger) -> None:
    """A Task's max_instances limits its runs, not those of others of the same function."""
    task = Task(name="one at a time", func_name="free", params={"name": "t1"}, interval_minutes=60, max_instances=1)
    task.save_sync()
    first = task.execute_now_sync()
    ledger.becomes(first.id, RunState.RUNNING)

    second = task.execute_now_sync()
    other = tasks["free"].delay("t2")

    run = ledger.becomes(second.id, RunState.WAITING)
    assert run.reason == "the only slot of schedule 'one at a time' was taken"
    ledger.becomes(other.id, RunState.RUNNING)
    ledger.open_gate("t1")
    ledger.open_gate("t2")
    for run_id in (first.id, second.id, other.id):
        assert ledger.ends(run_id).state is RunState.SUCCEEDED


def test_periodic_run_without_a_free_slot_is_skipped(project: Project, tasks: Any, ledger: Ledger) -> None:
    """The next instant comes anyway; the ledger says which run was skipped and why. A run by hand waits."""
    holder = tasks["alone"].delay("b0")
    ledger.becomes(holder.id, RunState.RUNNING)
    beat = project.beat()
    beat.wait_for_log("schedules are declared in code")  # a run that stands for several instants would wait
    task = Task(name="often", func_name="alone", params={"name": "b1"}, interval_minutes=1 / 60).save_sync()

    def skipped() -> list[Any]:
        return [run for run in ledger.all("alone") if run.name == "often" and run.state is RunState.SKIPPED]

    runs = wait_until(skipped, 60, "a periodic run is skipped")
    task.pause_sync()
    beat.terminate()
    by_hand = task.execute_now_sync()
    ledger.becomes(by_hand.id, RunState.WAITING)
    ledger.open_gate("b0")
    ledger.open_gate("b1")

    assert runs[0].reason == "the only slot of function 'alone' was taken"
    assert runs[0].delivered
    assert ledger.ends(by_hand.id).state is RunState.SUCCEEDED
