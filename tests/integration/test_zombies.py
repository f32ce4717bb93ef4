"""Coroutines that swallow their cancellation, in a worker of the asyncio pool with one place."""

from collections.abc import Iterator
from typing import Any

import pytest
from billiard.exceptions import TimeLimitExceeded

from llmtasks import Task
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, project_with
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import asyncio

    from billiard.exceptions import SoftTimeLimitExceeded

    from llmtasks import task_registry
    from tests.notebook import is_open, note


    @task_registry.register(name="add", max_retries=0)
    async def add(x, y):
        return x + y


    @task_registry.register(name="swallows", max_retries=0)
    async def swallows(name, times):
        note(name, "began")
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                note(name, "told")
                times -= 1
                if times < 0:
                    raise


    @task_registry.register(name="endures", max_retries=0)
    async def endures(name):
        note(name, "began")
        while not is_open(name):
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                note(name, "told")
        note(name, "ended")


    @task_registry.register(name="handles", max_retries=0)
    async def handles():
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            await asyncio.sleep(4)  # longer than a coroutine that was cancelled is given
        return "handled"
"""

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    environ = {**QUICK, "LLMTASKS_POOL": "asyncio", "LLMTASKS_SHUTDOWN_GRACE": "1"}
    with project_with(tmp_path_factory.mktemp("zombies"), TASKS, **environ) as project:
        yield project


@pytest.fixture
def worker(project: Project) -> Iterator[CeleryProcess]:
    worker = project.worker(concurrency=1)
    yield worker
    worker.close()


def zombies(project: Project) -> int:
    """How many ``celery inspect stats`` shows."""
    answers: Any = project.app.control.inspect(timeout=20, limit=1).stats()
    assert answers
    return int(next(iter(answers.values()))["pool"]["zombies"])


def cancel(project: Project, run_id: str) -> None:
    Task.cancel_run_sync(run_id)


def terminate(project: Project, run_id: str) -> None:
    project.app.control.revoke(run_id, terminate=True)


@pytest.mark.parametrize("stop", [cancel, terminate])
def test_run_that_swallows_its_cancellation_is_cancelled_again(
    stop: Any, project: Project, worker: CeleryProcess, ledger: Ledger
) -> None:
    """It is named once, with the line where it waits, keeps its place meanwhile, and ends cancelled."""
    name = f"swallows {stop.__name__}"
    result = project.app.tasks["swallows"].delay(name, 1)
    ledger.notes(name, 1)

    stop(project, result.id)
    ledger.notes(name, 2)
    assert zombies(project) == 0

    assert ledger.ends(result.id).state is RunState.CANCELLED
    assert ledger.notes_now(name) == ["began", "told", "told"]
    worker.wait_for_log(f"run {result.id} of swallows has ended")
    assert worker.log().count(f"run {result.id} of swallows was told to stop") == 1
    assert "await asyncio.sleep(60)" in worker.log()
    assert project.app.tasks["add"].delay(1, 2).get(timeout=60) == 3


def test_what_outlives_its_hard_limit_frees_its_place(project: Project, worker: CeleryProcess, ledger: Ledger) -> None:
    """The run is over and others run in its place; the coroutine is counted and told again until it ends."""
    result = project.app.tasks["endures"].apply_async(("endures",), soft_time_limit=0.5, time_limit=1)
    ledger.notes("endures", 1)

    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=60)
    assert ledger.ends(result.id).state is RunState.FAILED
    assert project.app.tasks["add"].delay(1, 2).get(timeout=60) == 3
    assert zombies(project) == 1
    worker.wait_for_log(f"run {result.id} of endures was told to stop")

    ledger.open_gate("endures")
    wait_until(lambda: zombies(project) == 0, 60, "it is not counted any more")
    assert ledger.notes_now("endures")[-1] == "ended"


def test_soft_limit_that_is_handled_is_left_alone(project: Project, worker: CeleryProcess) -> None:
    """Until the hard limit a coroutine may take its time."""
    result = project.app.tasks["handles"].apply_async((), soft_time_limit=0.2, time_limit=60)

    assert result.get(timeout=60) == "handled"
    assert f"run {result.id} of handles was told" not in worker.log()


def test_worker_ends_although_a_coroutine_does_not(project: Project, worker: CeleryProcess, ledger: Ledger) -> None:
    """After the grace its run is put back, uncounted, and the process ends with it."""
    result = project.app.tasks["endures"].delay("stays")
    ledger.notes("stays", 1)

    worker.terminate(timeout=30)
    ledger.open_gate("stays")
    worker.restart()

    run = ledger.ends(result.id)
    assert (run.state, run.attempts, run.losses) == (RunState.SUCCEEDED, 1, 0)
