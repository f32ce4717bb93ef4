"""The threads and solo pools: one shared loop, limits of coroutines enforced, contexts kept apart."""

from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from llmtasks import Task
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, on_pools
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import asyncio
    import threading
    import time

    import celery
    from billiard.exceptions import SoftTimeLimitExceeded

    from llmtasks import task_registry
    from tests.notebook import gate, note, notes


    @task_registry.register(name="add", max_retries=0)
    async def add(x, y):
        return x + y


    @task_registry.register(name="add_sync", max_retries=0)
    def add_sync(x, y):
        return x + y


    @task_registry.register(name="who", bind=True, max_retries=0)
    async def who(self, name):
        def seen():
            return [celery.current_task.request.id, self.request.id, celery.current_task.name]

        async def later(seconds):
            await asyncio.sleep(seconds)
            return seen()

        note(name)
        while len(notes(name)) < 2:
            await asyncio.sleep(0.02)
        children = await asyncio.gather(later(0.02), later(0))
        return [seen(), *children, await asyncio.to_thread(seen)]


    meeting = None


    @task_registry.register(name="meet", max_retries=0)
    async def meet():
        # Two runs meet at a barrier of asyncio: they are on one loop, at the same time.
        global meeting
        meeting = meeting or asyncio.Barrier(2)
        async with asyncio.timeout(30):
            await meeting.wait()
        return id(asyncio.get_running_loop())


    @task_registry.register(name="awaits", timeout=0.5, max_retries=0)
    async def awaits(name):
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            note(name, "tidied up")
            raise


    @task_registry.register(name="shaky", max_retries=2, retry_delay=0)
    async def shaky(name):
        note(name)
        if len(notes(name)) < 3:
            raise ConnectionError
        return "done"


    @task_registry.register(name="endless", max_retries=3, retry_delay=0)
    async def endless(name):
        note(name, "began")
        try:
            await asyncio.sleep(120)
        except asyncio.CancelledError:
            note(name, "cancelled")
            raise
"""

pytestmark = pytest.mark.redis


pool, project = on_pools(TASKS, "asyncio", "threads", "solo", **QUICK)


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project, pool: str) -> CeleryProcess:
    return project.worker(concurrency=1 if pool == "solo" else 4)


@pytest.fixture
def concurrent(pool: str) -> None:
    if pool == "solo":
        pytest.skip("one run at a time")


@pytest.mark.parametrize("name", ["add", "add_sync"])
def test_runs_are_recorded_in_this_pool_too(name: str, tasks: Any, ledger: Ledger) -> None:
    """Sync and async functions run, and the ledger has them."""
    result = tasks[name].delay(1, 2)

    assert result.get(timeout=60) == 3
    assert ledger.ends(result.id).state is RunState.SUCCEEDED


@pytest.mark.usefixtures("concurrent")
def test_coroutines_of_all_threads_share_a_loop(tasks: Any) -> None:
    """Two runs meet on one loop, so that clients made in one serve the others."""
    first, second = tasks["meet"].delay(), tasks["meet"].delay()

    assert first.get(timeout=60) == second.get(timeout=60)


@pytest.mark.usefixtures("concurrent")
def test_each_coroutine_sees_its_own_request(tasks: Any) -> None:
    """current_task and self.request are right in coroutines on one loop, their children and to_thread."""
    results = [tasks["who"].delay("who"), tasks["who"].delay("who")]

    for result in results:
        assert result.get(timeout=60) == [[result.id, result.id, "who"]] * 4


def test_timeout_of_a_coroutine_is_enforced(tasks: Any, ledger: Ledger) -> None:
    """The coroutine gets SoftTimeLimitExceeded although the pool itself knows no limits."""
    result = tasks["awaits"].delay("limited")

    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=60)
    assert ledger.notes_now("limited") == ["tidied up"]
    assert ledger.ends(result.id).attempts == 1


def test_retries_come_from_the_ledger(tasks: Any, ledger: Ledger) -> None:
    """A failed attempt is followed by the next one."""
    result = tasks["shaky"].delay("shaky")

    assert result.get(timeout=60) == "done"
    assert ledger.ends(result.id).attempts == 3


def test_running_coroutine_is_cancelled(tasks: Any, ledger: Ledger) -> None:
    """Task.cancel_run reaches a coroutine that awaits; it sees CancelledError, and the worker lives on."""
    result = tasks["endless"].delay("endless")
    ledger.notes("endless", 1)

    Task.cancel_run_sync(result.id)

    run = ledger.ends(result.id)
    assert run.state is RunState.CANCELLED
    assert ledger.notes_now("endless") == ["began", "cancelled"]
    wait_until(lambda: result.state == "REVOKED", 60, "the result says so")
    assert tasks["add"].delay(1, 1).get(timeout=60) == 2
