"""Pausing a function or a queue in the whole cluster: within a second nothing of it starts, and nothing is lost."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from llmtasks import Task
from llmtasks.dispatch import station
from llmtasks.doctor import examine
from llmtasks.errors import InvalidOptionError, UnknownTaskFunctionError
from llmtasks.states import RunState
from llmtasks.why import explain
from tests.ledger import QUICK, Ledger, on_pools, queue_length
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="paused", max_retries=3, retry_delay=0)
    async def paused(name, number=0):
        note(name, str(number))


    @task_registry.register(name="slotted", max_retries=0, max_instances=1)
    def slotted(name, number=0):
        note(name, str(number))


    @task_registry.register(name="shaky", max_retries=3, retry_delay=2)
    async def shaky(name):
        note(name)
        raise ConnectionError


    @task_registry.register(name="gated", max_retries=0)
    async def gated(name):
        note(name, "began")
        await gate(name)
        note(name, "ended")


    @task_registry.register(name="free", max_retries=0)
    async def free(x):
        return x


    @task_registry.register(name="off", ledger="off")
    async def off():
        pass
"""

pytestmark = pytest.mark.redis


pool, project = on_pools(TASKS, "asyncio", "prefork", **QUICK)


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    return project.worker(concurrency=2)


@pytest.fixture(autouse=True)
def nothing_paused(project: Project) -> Iterator[None]:
    """Each test begins and ends without a pause."""
    assert project.app.tasks["free"]  # its functions are this process's, too, whichever test comes first
    yield
    for pause in Task.pauses_sync():
        {"function": Task.resume_function_sync, "queue": Task.resume_queue_sync}[pause.kind](pause.name)


def pause_function(name: str, **words: str) -> None:
    """Pause a function and give the workers the second that they have."""
    Task.pause_function_sync(name, **words)
    time.sleep(1)  # the promise


@pytest.mark.parametrize("name", ["paused", "slotted"])
def test_paused_function_starts_when_it_is_resumed_in_the_order_of_priority_and_age(
    name: str, tasks: Any, ledger: Ledger
) -> None:
    """Its runs wait in the ledger with who paused it and why; others run; then the first in line come first."""
    pause_function(name, by="ops", reason="the provider is down")
    results = [tasks[name].apply_async((name, number), priority=9 - number // 2) for number in range(8)]

    waiting = [ledger.becomes(result.id, RunState.WAITING) for result in results]

    assert tasks["free"].delay(1).get(timeout=60) == 1
    assert all(f"function '{name}' is paused by ops since" in str(run.reason) for run in waiting)
    assert ": the provider is down" in explain(station(tasks[name].app), results[0].id).answer
    assert [run.attempts for run in waiting] == [0] * 8
    time.sleep(1)  # two rounds of the keeper, which promotes nothing
    assert ledger.notes_now(name) == []

    ended = Task.resume_function_sync(name)
    assert ended is not None
    assert ended.paused_by == "ops"
    began = ledger.notes(name, 8)
    for result in results:
        assert ledger.ends(result.id).state is RunState.SUCCEEDED
    if name == "slotted":
        assert began == ["6", "7", "4", "5", "2", "3", "0", "1"]
    assert set(began[:3]) <= {"4", "5", "6", "7"}


def test_what_runs_goes_on_and_a_retry_waits(tasks: Any, ledger: Ledger) -> None:
    """A pause ends nothing; the next attempt of a run that failed before waits, uncounted."""
    running, shaky = tasks["gated"].delay("going on"), tasks["shaky"].delay("retried")
    ledger.notes("going on", 1)
    ledger.becomes(shaky.id, RunState.RETRYING)

    pause_function("gated")
    pause_function("shaky")
    ledger.open_gate("going on")

    assert ledger.ends(running.id).state is RunState.SUCCEEDED
    assert ledger.becomes(shaky.id, RunState.WAITING).attempts == 1
    assert len(ledger.notes_now("retried")) == 1
    Task.resume_function_sync("shaky")
    ledger.notes("retried", 2)
    Task.cancel_run_sync(shaky.id)


def test_schedule_of_a_paused_function_opens_a_run_that_waits(ledger: Ledger) -> None:
    """So does execute_now; cancelled while it waits, it never starts."""
    pause_function("paused")
    task = Task(func_name="paused", params={"name": "scheduled"}, interval_minutes=1000).save_sync()

    first, second = task.execute_now_sync(), task.execute_now_sync()
    ledger.becomes(first.id, RunState.WAITING)
    ledger.becomes(second.id, RunState.WAITING)
    Task.cancel_run_sync(second.id)
    Task.resume_function_sync("paused")

    assert ledger.ends(first.id).state is RunState.SUCCEEDED
    assert ledger.ends(second.id).state is RunState.CANCELLED
    assert len(ledger.notes_now("scheduled")) == 1


def test_pause_outlives_all_processes(project: Project, worker: CeleryProcess, tasks: Any, ledger: Ledger) -> None:
    """After kill -9 of the worker its successor starts none either, and in the end each run has run once."""
    pause_function("paused")
    before = tasks["paused"].delay("outlived", 1)
    ledger.becomes(before.id, RunState.WAITING)

    worker.kill()
    after = tasks["paused"].delay("outlived", 2)
    worker.start()
    worker.wait_until_ready()

    ledger.becomes(after.id, RunState.WAITING)
    assert ledger.notes_now("outlived") == []
    Task.resume_function_sync("paused")
    assert sorted(ledger.notes("outlived", 2)) == ["1", "2"]
    assert ledger.ends(after.id).state is RunState.SUCCEEDED


def test_paused_queue_keeps_its_messages(project: Project, tasks: Any, ledger: Ledger) -> None:
    """Workers stop to consume it within a second, later ones do not begin; resumed, they all take it up."""
    Task.pause_queue_sync("celery", by="ops", reason="maintenance")
    time.sleep(1)  # the promise
    result = tasks["paused"].delay("queued")
    second = project.worker("-Q", "celery,other", concurrency=2)
    other = tasks["free"].apply_async((2,), queue="other")

    assert other.get(timeout=60) == 2
    assert queue_length(project.broker) == 1
    assert ledger.run(result.id) is None
    codes = {finding.code for finding in examine(station(project.app)).findings}
    assert "queue-paused" in codes
    assert "queue-without-consumer" not in codes

    began = time.monotonic()
    Task.resume_queue_sync("celery")
    ledger.notes("queued", 1)
    assert time.monotonic() - began < 5
    active: Any = {}

    def both_consume() -> bool:
        nonlocal active
        active = project.app.control.inspect(timeout=2).active_queues() or {}
        return sum("celery" in {queue["name"] for queue in queues} for queues in active.values()) == 2

    wait_until(both_consume, 30, "both workers consume it")
    assert second.terminate() == 0


def test_only_what_can_be_paused_is(project: Project) -> None:
    """A function that nobody registered, and one without a ledger, are refused by name."""
    assert project.app.tasks["free"]

    with pytest.raises(UnknownTaskFunctionError, match="pausd"):
        Task.pause_function_sync("pausd")
    with pytest.raises(InvalidOptionError, match=r"function='off': .*pause its queue"):
        Task.pause_function_sync("off")


def test_second_pause_leaves_the_first_as_it_is(project: Project) -> None:
    """Who paused it stays who it was."""
    assert project.app.tasks["free"]
    Task.pause_function_sync("free", by="first", reason="one")

    again = Task.pause_function_sync("free", by="second")

    assert (again.paused_by, again.reason) == ("first", "one")
    assert [pause.name for pause in Task.pauses_sync()] == ["free"]
