"""Functions with ``ledger="off"``: plain Celery tasks with our loop, limits, priorities and retries; no database."""

from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from llmtasks.errors import InvalidParamsError
from tests.ledger import Ledger, on_pools, queue_length
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

#: A database server that nobody runs: whoever asks it anything gets an error.
NO_DATABASE = "postgresql://nobody@127.0.0.1:1/none"

TASKS = """
    import asyncio
    import os
    import time

    from billiard.exceptions import SoftTimeLimitExceeded

    from llmtasks import task_registry
    from tests.notebook import gate, note, notes


    @task_registry.register(name="add", ledger="off", max_retries=0)
    async def add(x, y):
        await asyncio.sleep(0)
        return x + y


    @task_registry.register(name="add_sync", ledger="off", max_retries=0)
    def add_sync(x, y):
        return x + y


    @task_registry.register(name="silent", ledger="off", max_retries=0, ignore_result=True)
    async def silent(name):
        note(name)


    @task_registry.register(name="shaky", ledger="off", max_retries=2, retry_delay=0, bind=True)
    async def shaky(self, name):
        delivery = self.request.delivery_info
        note(name, f"{self.request.retries} {delivery['priority']} {delivery['routing_key']}")
        raise ConnectionError("always")


    @task_registry.register(name="thrown", ledger="off", max_retries=2, retry_delay=0, throws=(KeyError,))
    def thrown(name):
        note(name)
        raise KeyError(name)


    @task_registry.register(name="limited", ledger="off", timeout=0.5, max_retries=0)
    async def limited(name):
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            note(name, "tidied up")
            raise


    @task_registry.register(name="endless", ledger="off", max_retries=3, retry_delay=0)
    async def endless(name):
        note(name, f"began {os.getpid()}")
        try:
            await gate(name)
        except asyncio.CancelledError:
            note(name, "cancelled")
            raise
        note(name, "ended")


    @task_registry.register(name="dies_once", ledger="off", max_retries=2, retry_delay=0)
    def dies_once(name):
        note(name)
        if len(notes(name)) == 1:
            os.kill(os.getpid(), 9)
        return "lived"


    @task_registry.register(name="overruns_once", ledger="off", max_retries=1, retry_delay=0, time_limit=1)
    def overruns_once(name):
        note(name)
        if len(notes(name)) == 1:
            time.sleep(60)
        return "in time"
"""

pytestmark = pytest.mark.redis


pool, project = on_pools(TASKS, "asyncio", "prefork", LLMTASKS_DATABASE_URL=NO_DATABASE, LLMTASKS_SHUTDOWN_GRACE="1")


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    return project.worker(concurrency=4)


@pytest.mark.parametrize("name", ["add", "add_sync"])
def test_runs_without_a_database(name: str, tasks: Any) -> None:
    """Sync and async functions run and give their results although no database answers."""
    assert tasks[name].delay(1, 2).get(timeout=60) == 3


def test_failed_attempt_is_followed_by_another_of_the_same_priority_and_queue(tasks: Any, ledger: Ledger) -> None:
    """Each retry is a message with the first one's id, queue and priority; the last error is the run's."""
    result = tasks["shaky"].apply_async(("retried",), priority=3)

    with pytest.raises(ConnectionError, match="always"):
        result.get(timeout=60)
    assert ledger.notes_now("retried") == ["0 2 celery", "1 2 celery", "2 2 celery"]


def test_error_of_throws_is_final(tasks: Any, ledger: Ledger) -> None:
    """An error that the function was registered to throw is not retried."""
    with pytest.raises(KeyError):
        tasks["thrown"].delay("thrown").get(timeout=60)
    assert len(ledger.notes_now("thrown")) == 1


def test_timeout_reaches_the_coroutine(tasks: Any, ledger: Ledger) -> None:
    """A coroutine gets SoftTimeLimitExceeded at its timeout."""
    with pytest.raises(SoftTimeLimitExceeded):
        tasks["limited"].delay("limited").get(timeout=60)
    assert ledger.notes_now("limited") == ["tidied up"]


def test_argument_that_json_cannot_carry_is_refused_by_the_sender(tasks: Any) -> None:
    """The error names the argument, before anything is sent."""
    with pytest.raises(InvalidParamsError, match="args"):
        tasks["add"].delay(object(), 1)


def test_revoked_before_it_starts_never_starts(tasks: Any, ledger: Ledger) -> None:
    """Celery's revoke is what cancels such a run."""
    result = tasks["silent"].apply_async(("revoked",), countdown=2)
    result.revoke()

    assert tasks["add"].apply_async((1, 1), countdown=3).get(timeout=60) == 2
    assert ledger.notes_now("revoked") == []


def test_terminated_run_ends(tasks: Any, ledger: Ledger, pool: str) -> None:
    """revoke(terminate=True) cancels the coroutine on the asyncio pool and ends the child on prefork."""
    if pool == "threads":
        pytest.skip("Celery's threads pool ends nothing")
    result = tasks["endless"].delay("terminated")
    ledger.notes("terminated", 1)

    result.revoke(terminate=True)

    wait_until(lambda: result.state == "REVOKED", 60, "the result says so")
    if pool == "asyncio":
        assert ledger.notes("terminated", 2)[1:] == ["cancelled"]
    assert tasks["add"].delay(1, 1).get(timeout=60) == 2
    ledger.open_gate("terminated")


def test_lost_child_is_replaced_by_a_retry(tasks: Any, ledger: Ledger, pool: str) -> None:
    """kill -9 of a prefork child costs its run an attempt, not the run."""
    if pool != "prefork":
        pytest.skip("a run that kills its process kills the worker")
    assert tasks["dies_once"].delay("killed").get(timeout=60) == "lived"
    assert len(ledger.notes_now("killed")) == 2


def test_run_ended_at_its_hard_limit_is_retried(tasks: Any, ledger: Ledger, pool: str) -> None:
    """A child that does not heed its limit is ended, and the run has its retries."""
    if pool != "prefork":
        pytest.skip("nothing ends a thread")
    assert tasks["overruns_once"].delay("overrun").get(timeout=60) == "in time"
    assert len(ledger.notes_now("overrun")) == 2


def test_shutdown_gives_back_what_does_not_end(project: Project, tasks: Any, ledger: Ledger, pool: str) -> None:
    """After the grace a run's message is with the broker again, and the next worker runs it."""
    if pool == "threads":
        pytest.skip("as on the asyncio pool: there coroutines are interrupted alike")
    tasks["endless"].apply_async(("given back",), queue="second")
    second = project.worker("-Q", "second", concurrency=2)
    ledger.notes("given back", 1)

    assert second.terminate(30) == 0

    assert queue_length(project.broker, "second") == 1
    second.start()
    ledger.open_gate("given back")
    wait_until(lambda: "ended" in ledger.notes_now("given back"), 60, "the next worker to run it")
    # Whether a child that the pool ends writes that it was cancelled is a matter of milliseconds.
    began = [note.split()[0] for note in ledger.notes_now("given back") if note != "cancelled"]
    assert began == ["began", "began", "ended"]
    second.terminate()


@pytest.mark.parametrize("pool", ["asyncio"], indirect=True)
def test_killed_worker_loses_no_run(project: Project, tasks: Any, ledger: Ledger) -> None:
    """kill -9 of the whole worker: the broker gives the message to the next one."""
    tasks["endless"].apply_async(("survives",), queue="third")
    third = project.worker("-Q", "third", concurrency=2)
    ledger.notes("survives", 1)

    third.kill()
    third.start()

    ledger.open_gate("survives")
    began = [note.split()[0] for note in ledger.notes("survives", 3)]
    assert began == ["began", "began", "ended"]
    third.terminate()
