"""SIGTERM of a worker under load: no run is lost, none is called twice without need, no attempt is spent."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger
from tests.processes import CeleryProcess, Project

TASKS = """
    import asyncio
    import os
    import time

    from llmtasks import task_registry
    from tests.notebook import gate, gate_sync, note


    @task_registry.register(name="works", max_retries=0)
    def works(number):
        note("works", number)
        time.sleep(0.05)
        note("worked", number)


    @task_registry.register(name="passes", max_retries=0)
    async def passes(name):
        note(name, os.getpid())
        await gate(name)
        return "done"


    @task_registry.register(name="passes_sync", max_retries=0)
    def passes_sync(name):
        note(name, os.getpid())
        gate_sync(name)
        return "done"
"""
Start = Callable[..., CeleryProcess]

pytestmark = [pytest.mark.redis, pytest.mark.fault]


@pytest.fixture(scope="module")
def environ() -> dict[str, str]:
    return {**QUICK, "LLMTASKS_SHUTDOWN_GRACE": "1.5"}


@pytest.fixture
def tasks(project: Project) -> Any:
    return project.app.tasks


@pytest.fixture(params=["asyncio", "prefork", "threads"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_worker_under_load_hands_everything_on(
    pool: str, project: Project, start_worker: Start, tasks: Any, ledger: Ledger
) -> None:
    """Sixty short runs, SIGTERM in the middle, then another worker: each run was called once and succeeded."""
    worker = start_worker(pool=pool)
    before = len(ledger.notes_now("worked"))
    results = tasks["works"].map_delay(range(60))
    ledger.notes("worked", before + 10)

    assert worker.terminate() == 0
    assert len(ledger.notes_now("worked")) < before + 60
    start_worker(pool=pool)

    for result in results:
        run = ledger.ends(result.id)
        assert (run.state, run.attempts, run.losses) == (RunState.SUCCEEDED, 1, 0)
    assert sorted(ledger.notes_now("works")[before:], key=int) == [str(number) for number in range(60)]


@pytest.mark.parametrize("function", ["passes", "passes_sync"])
def test_run_that_ends_within_the_grace_ends_where_it_began(
    function: str, start_worker: Start, tasks: Any, ledger: Ledger
) -> None:
    """A warm shutdown waits for what runs."""
    name = f"{function} in time"
    worker = start_worker()
    result = tasks[function].delay(name)
    ledger.notes(name, 1)

    worker.signal(signal.SIGTERM)
    worker.wait_for_log("Warm shutdown")
    ledger.open_gate(name)

    assert worker.process.wait(60) == 0
    run = ledger.run(result.id)
    assert run is not None
    assert (run.state, run.attempts, run.delivered) == (RunState.SUCCEEDED, 1, True)


@pytest.mark.parametrize("function", ["passes", "passes_sync"])
def test_runs_that_outlast_the_grace_are_put_back_uncounted(
    function: str, pool: str, start_worker: Start, tasks: Any, ledger: Ledger
) -> None:
    """The worker ends soon after its grace; the next one runs everything, as first attempts: they have no retries."""
    name = f"{function} too long {pool}"
    worker = start_worker(pool=pool)
    results = [tasks[function].delay(name) for _ in range(4)]
    ledger.notes(name, 2)

    began = time.monotonic()
    worker.terminate(timeout=30)
    seconds = time.monotonic() - began
    start_worker(pool=pool)
    ledger.notes(name, 4)
    ledger.open_gate(name)

    assert seconds >= 1.4
    assert "Traceback" not in worker.log()
    for result in results:
        assert result.get(timeout=60) == "done"
        run = ledger.ends(result.id)
        assert (run.state, run.attempts, run.losses) == (RunState.SUCCEEDED, 1, 0)
    assert len(ledger.notes_now(name)) == 6
