"""Hooks around the life of a worker's loop: before the first run, on the loop of the runs, and after the last."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ledger import QUICK, Ledger
from tests.processes import CeleryProcess, Project

TASKS = """
    import asyncio
    import os
    import threading

    from llmtasks import on_worker_loop_start, on_worker_loop_stop, task_registry
    from tests.notebook import gate, is_open, note, notes

    loop = None
    lock = None


    @on_worker_loop_start
    async def open_lock():
        global loop, lock
        note("life", "opening")
        await gate("opens")
        loop, lock = asyncio.get_running_loop(), asyncio.Lock()


    @on_worker_loop_start
    def look():
        note("life", f"started {asyncio.get_running_loop() is loop}")


    @on_worker_loop_stop
    def last():
        note("life", f"last {asyncio.get_running_loop() is loop}")


    @on_worker_loop_stop
    async def breaks():
        raise OSError("cannot be closed")


    @on_worker_loop_stop
    async def close_lock():
        async with lock:
            await asyncio.sleep(600 if is_open("hangs") else 0)
        note("life", "closed")


    @task_registry.register(name="use", max_retries=0)
    async def use():
        note("life", "run")
        async with lock:
            await asyncio.sleep(0.01)
        return asyncio.get_running_loop() is loop


    @task_registry.register(name="stay", max_retries=0)
    async def stay():
        note("stay")
        await gate("stay")
        note("life", "run")
"""
POOLS = ["asyncio", "threads", "prefork", "solo"]

pytestmark = pytest.mark.redis


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(project: Project, pool: str) -> Iterator[Callable[..., CeleryProcess]]:
    """Start a worker of this pool that runs one thing at a time, and so has one loop."""
    project.environ |= {**QUICK, "LLMTASKS_POOL": pool}

    def start(wait: bool = True, **environ: str) -> CeleryProcess:
        project.environ |= environ
        return project.worker(concurrency=1, wait=wait)

    yield start
    project.close()


def test_hooks_run_around_the_runs_on_their_loop(
    start: Callable[..., CeleryProcess], project: Project, ledger: Ledger
) -> None:
    """No run starts before they are done; what they open serves the runs; one that fails at the end hinders none."""
    project.tasks(TASKS)
    results = [project.app.tasks["use"].delay() for _ in range(3)]
    worker = start(wait=False)
    ledger.notes("life", 1)
    ledger.open_gate("opens")

    assert [result.get(timeout=60) for result in results] == [True, True, True]
    assert worker.terminate() == 0

    assert ledger.notes_now("life") == ["opening", "started True", "run", "run", "run", "closed", "last True"]
    assert "stop hook tasks.breaks failed" in worker.log()
    assert "OSError: cannot be closed" in worker.log()


def test_stop_hooks_wait_for_the_last_run(
    start: Callable[..., CeleryProcess], project: Project, ledger: Ledger
) -> None:
    """A run that ends within the grace still finds what they close."""
    project.tasks(TASKS)
    ledger.open_gate("opens")
    worker = start()
    project.app.tasks["stay"].delay()
    ledger.notes("stay", 1)

    worker.signal(signal.SIGTERM)
    worker.wait_for_log("Warm shutdown")
    ledger.open_gate("stay")

    assert worker.process.wait(60) == 0
    assert ledger.notes_now("life") == ["opening", "started True", "run", "closed", "last True"]


def test_stop_hooks_end_with_the_grace(start: Callable[..., CeleryProcess], project: Project, ledger: Ledger) -> None:
    """One that hangs does not keep the worker."""
    project.tasks(TASKS)
    ledger.open_gate("opens")
    ledger.open_gate("hangs")
    worker = start(LLMTASKS_SHUTDOWN_GRACE="2")

    worker.terminate(timeout=30)

    assert "closed" not in ledger.notes_now("life")


def test_error_in_a_start_hook_ends_the_worker(
    start: Callable[..., CeleryProcess], project: Project, ledger: Ledger
) -> None:
    """It says which hook and why, ends with an error, and no run has started."""
    project.tasks("""
        from llmtasks import on_worker_loop_start, on_worker_loop_stop, task_registry
        from tests.notebook import note


        @on_worker_loop_start
        async def connect():
            raise ConnectionError("the model server does not answer")


        @on_worker_loop_stop
        async def disconnect():
            note("disconnected")


        @task_registry.register(name="use")
        async def use():
            note("run")
    """)
    project.app.tasks["use"].delay()
    worker = start(wait=False)

    assert worker.process.wait(60) == 1
    log = worker.log()
    assert "its start hook tasks.connect failed: ConnectionError: the model server does not answer" in log
    assert ledger.notes_now("run") == []
    assert ledger.notes_now("disconnected") == []


def test_each_prefork_child_has_its_own(project: Project, ledger: Ledger) -> None:
    """Also those that come later, in the place of one that has done its share."""
    project.environ |= {**QUICK, "LLMTASKS_POOL": "prefork"}
    project.tasks(TASKS)
    ledger.open_gate("opens")
    worker = project.worker("--max-tasks-per-child=1", concurrency=1)

    results: list[Any] = [project.app.tasks["use"].delay() for _ in range(2)]

    assert [result.get(timeout=60) for result in results] == [True, True]
    assert worker.terminate() == 0
    life = ledger.notes_now("life")
    assert life[:10] == ["opening", "started True", "run", "closed", "last True"] * 2


def test_error_in_a_later_child_ends_the_worker_too(project: Project, ledger: Ledger) -> None:
    """Otherwise Celery would start children for ever."""
    project.environ |= {**QUICK, "LLMTASKS_POOL": "prefork"}
    project.tasks("""
        from llmtasks import on_worker_loop_start, task_registry
        from tests.notebook import note, notes


        @on_worker_loop_start
        async def connect():
            note("connects")
            if len(notes("connects")) > 1:
                raise ConnectionError("the model server does not answer")


        @task_registry.register(name="use")
        async def use():
            pass
    """)
    worker = project.worker("--max-tasks-per-child=1", concurrency=1)

    project.app.tasks["use"].delay().get(timeout=60)

    assert worker.process.wait(60) == 1
    assert "its start hook tasks.connect failed: ConnectionError" in worker.log()
    assert "Warm shutdown" in worker.log()


def test_start_hooks_may_take_their_time_in_children(project: Project) -> None:
    """Celery alone kills each child but the first that is not up after four seconds."""
    project.environ |= {**QUICK, "LLMTASKS_POOL": "prefork"}
    project.tasks("""
        import asyncio

        from llmtasks import on_worker_loop_start, task_registry

        warm = False


        @on_worker_loop_start
        async def warm_up():
            global warm
            await asyncio.sleep(6)
            warm = True


        @task_registry.register(name="use", max_retries=0)
        async def use():
            return warm
    """)
    results = [project.app.tasks["use"].delay() for _ in range(2)]
    worker = project.worker("--max-tasks-per-child=1", concurrency=1)

    assert [result.get(timeout=60) for result in results] == [True, True]
    assert "Timed out waiting for UP message" not in worker.log()
