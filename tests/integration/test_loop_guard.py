"""The asyncio pool's loop is guarded: what blocks it is named, past a limit the worker ends; on both kinds of loop."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, project_with
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import asyncio
    import ctypes
    import time

    from celery import signals

    from llmtasks import task_registry


    def wait_without_await(seconds):
        time.sleep(seconds)


    @task_registry.register(name="add", max_retries=0)
    async def add(x, y):
        return x + y


    @task_registry.register(name="add_sync", max_retries=0)
    def add_sync(x, y):
        return x + y


    @task_registry.register(name="block", max_retries=0)
    async def block(seconds):
        await asyncio.sleep(0)
        wait_without_await(seconds)


    @task_registry.register(name="block_in_child", max_retries=0)
    async def block_in_child(seconds):
        async def child():
            wait_without_await(seconds)

        await asyncio.create_task(child())


    @task_registry.register(name="block_in_signal", max_retries=0)
    async def block_in_signal(seconds):
        pass


    @signals.task_prerun.connect
    def before(task, args, **_):
        if task.name == "block_in_signal":
            wait_without_await(*args)


    @task_registry.register(name="block_lock", max_retries=0)
    async def block_lock(seconds):
        ctypes.PyDLL(None).sleep(seconds)  # unlike CDLL it keeps the interpreter's lock
"""

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    """The module of the loop that the worker runs on."""
    if request.param == "uvloop" and importlib.util.find_spec("uvloop") is None:
        pytest.skip("uvloop is not installed: it has no wheel for this Python or platform")
    return str(request.param)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, loop: str) -> Iterator[Project]:
    with project_with(tmp_path_factory.mktemp(loop), TASKS, **QUICK, LLMTASKS_POOL="asyncio") as project:
        if loop == "asyncio":
            project.write("uvloop.py", "raise ImportError('hidden')")
        yield project


@pytest.fixture(scope="module")
def worker(project: Project) -> Iterator[CeleryProcess]:
    worker = project.worker(concurrency=10)
    yield worker
    worker.close()


def stats(project: Project) -> dict[str, Any]:
    """What ``celery inspect stats`` shows of the only worker's pool."""
    answers: Any = project.app.control.inspect(timeout=20, limit=1).stats()
    assert answers
    return dict(next(iter(answers.values()))["pool"])


def warnings(worker: CeleryProcess, run_id: str) -> int:
    return sum("loop has been blocked" in line and run_id in line for line in worker.log().splitlines())


@pytest.mark.parametrize("name", ["add", "add_sync"])
def test_runs_end_on_this_loop(name: str, loop: str, project: Project, worker: CeleryProcess) -> None:
    """Coroutines and plain functions run, and ``inspect stats`` names the loop and is at ease with it."""
    assert project.app.tasks[name].delay(1, 2).get(timeout=60) == 3

    shown = stats(project)
    assert shown["loop"] == loop
    assert shown["zombies"] == 0
    assert 0 <= shown["loop_lag"] <= shown["loop_lag_worst"]


def test_coroutine_that_blocks_is_named_once_with_its_stack(
    project: Project, worker: CeleryProcess, ledger: Ledger
) -> None:
    """The warning has run, function, the line that blocks and what to do; the lag is in ``inspect stats``."""
    before = stats(project)["loop_blockages"]
    result = project.app.tasks["block"].delay(2.5)
    worker.wait_for_log(f"by run {result.id} of block")
    assert ledger.ends(result.id).state is RunState.SUCCEEDED
    worker.wait_for_log("the event loop goes on; it was blocked for 2.")

    log = worker.log()
    assert warnings(worker, result.id) == 1
    assert "asyncio.to_thread" in log
    assert "time.sleep(seconds)" in log
    shown = stats(project)
    assert shown["loop_blockages"] == before + 1
    assert 2 < shown["loop_lag_worst"] < 60
    wait_until(lambda: stats(project)["loop_lag"] < 1, 60, "the lag is over")


def test_what_a_run_started_and_what_surrounds_it_is_named_too(
    loop: str, project: Project, worker: CeleryProcess
) -> None:
    """A child task, where the loop lets it be known, and Celery's signals, which are sent on the loop."""
    child = project.app.tasks["block_in_child"].delay(1.5)
    child.get(timeout=60)
    if loop == "asyncio":
        worker.wait_for_log(f"by something that run {child.id} of block_in_child started")
    around = project.app.tasks["block_in_signal"].delay(1.5)
    around.get(timeout=60)
    worker.wait_for_log(f"by what surrounds run {around.id} of block_in_signal")


def test_call_that_keeps_the_interpreters_lock_is_said_too(project: Project, worker: CeleryProcess) -> None:
    """The watchdog could not look meanwhile; it sees that, and does not call it a wait."""
    before = stats(project)["loop_blockages"]

    project.app.tasks["block_lock"].delay(2).get(timeout=120)

    wait_until(lambda: stats(project)["loop_blockages"] == before + 1, 60, "it is counted")
    worker.wait_for_log("the whole process stood still for")
    assert stats(project)["loop_lag_worst"] > 1
