"""Fencing and delivery: who lost a run writes nothing more; an end that is in the ledger is told without a new call."""

import contextlib
import signal
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from celery.exceptions import TaskRevokedError

from llmtasks import Task
from llmtasks.states import RunState
from tests.ledger import Ledger
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import asyncio
    import os

    from llmtasks import task_registry
    from tests.notebook import gate, gate_sync, note


    def tell(run, outcome):
        note("told", f"{run.id} {run.state}")


    @task_registry.register(name="passes", max_retries=3, retry_delay=0)
    async def passes(name):
        note(name, os.getpid())
        try:
            await gate(f"{name} {os.getpid()}")
        except asyncio.CancelledError:
            note(f"{name} stopped", os.getpid())
            raise
        note(f"{name} came through", os.getpid())
        return os.getpid()


    @task_registry.register(name="passes_sync", max_retries=3, retry_delay=0)
    def passes_sync(name):
        note(name, os.getpid())
        gate_sync(f"{name} {os.getpid()}")
        note(f"{name} came through", os.getpid())
        return os.getpid()


    @task_registry.register(name="ends", max_retries=0, on_failure=tell, on_success=tell)
    async def ends(name, fail):
        note(name)
        await gate(name)
        if fail:
            raise ValueError("broken")
        return "fine"


    @task_registry.register(name="see", max_retries=0)
    def see(name, *values):
        note(name, values)
"""
Start = Callable[..., CeleryProcess]

pytestmark = [pytest.mark.redis, pytest.mark.fault]


@pytest.fixture
def tasks(project: Project) -> Any:
    return project.app.tasks


@contextlib.contextmanager
def frozen(worker: CeleryProcess, project: Project) -> Iterator[None]:
    """SIGSTOP a worker and its children, then let them go on.

    Not inside a transaction: on SQLite that would hold up everybody for as long as it lasts.
    """
    family = [psutil.Process(worker.pid), *worker.family()]

    def freeze() -> bool:
        for member in family:
            member.suspend()
        if is_writable(project):
            return True
        resume()
        return False

    def resume() -> None:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()

    wait_until(freeze, 30, "the worker to be frozen outside of a transaction")
    try:
        yield
    finally:
        resume()


def is_writable(project: Project) -> bool:
    """Whether nobody holds SQLite's write lock for longer than a moment."""
    path = project.database_url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=0.5)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        connection.execute("ROLLBACK")
        return True


@pytest.mark.parametrize(
    ("function", "pool"), [("passes", "asyncio"), ("passes", "prefork"), ("passes_sync", "prefork")]
)
def test_late_worker_writes_nothing_while_another_runs_its_run(
    function: str, pool: str, project: Project, start_worker: Start, tasks: Any, ledger: Ledger
) -> None:
    """Frozen past its lease, then back: its attempt stops, and what the run becomes is the other worker's doing."""
    name = f"{function} {pool} meanwhile"
    late = start_worker(concurrency=1, pool=pool)
    result = tasks[function].delay(name)
    [first] = ledger.notes(name, 1)

    with frozen(late, project):
        start_worker(concurrency=1, pool=pool)
        second = ledger.notes(name, 2)[1]
    if function == "passes":
        ledger.notes(f"{name} stopped", 1)
    else:
        wait_until(lambda: not psutil.pid_exists(int(first)), 60, "the late sync body's process is ended")
    run = ledger.run(result.id)
    assert run is not None
    assert run.state is RunState.RUNNING
    ledger.open_gate(f"{name} {first}")
    ledger.open_gate(f"{name} {second}")

    assert result.get(timeout=60) == int(second)
    run = ledger.ends(result.id)
    assert (run.state, run.attempts, run.losses, run.result) == (RunState.SUCCEEDED, 2, 1, int(second))
    assert ledger.notes_now(f"{name} came through") == [second]


def test_late_worker_writes_nothing_after_another_ended_its_run(
    project: Project, start_worker: Start, tasks: Any, ledger: Ledger
) -> None:
    """The run ended while it was frozen: neither the ledger nor the result changes when it comes back."""
    name = "afterwards"
    late = start_worker(concurrency=1)
    result = tasks["passes_sync"].delay(name)
    [first] = ledger.notes(name, 1)

    with frozen(late, project):
        other = start_worker(concurrency=1)
        second = ledger.notes(name, 2)[1]
        ledger.open_gate(f"{name} {second}")
        assert result.get(timeout=60) == int(second)
        before = ledger.ends(result.id)
        ledger.open_gate(f"{name} {first}")
        other.terminate()
    # It may come through or be ended first; a later run of the same worker shows that it is done with this one.
    after = tasks["see"].delay("late worker is back")
    ledger.ends(after.id)

    assert ledger.run(result.id) == before
    assert project.app.AsyncResult(result.id).get(timeout=60) == int(second)


@pytest.mark.parametrize("fail", [False, True])
def test_end_that_was_not_told_is_told_without_a_new_call(
    fail: bool, project: Project, start_worker: Start, tasks: Any, ledger: Ledger
) -> None:
    """Killed between the ledger's write and Celery's (its server hangs): result, link and callback still come."""
    name = f"untold {fail}"
    victim = start_worker()
    links = {"link": tasks["see"].si(f"{name} link"), "link_error": tasks["see"].si(f"{name} errback")}
    result = tasks["ends"].apply_async((name, fail), **links)
    ledger.notes(name, 1)

    project.broker.process.signal(signal.SIGSTOP)
    try:
        ledger.open_gate(name)
        run = ledger.becomes(result.id, RunState.FAILED if fail else RunState.SUCCEEDED)
        assert not run.delivered
        victim.kill()
    finally:
        project.broker.process.signal(signal.SIGCONT)
    start_worker()

    if fail:
        with pytest.raises(ValueError, match="broken"):
            result.get(timeout=60)
    else:
        assert result.get(timeout=60) == "fine"
    ledger.notes(f"{name} {'errback' if fail else 'link'}", 1)
    assert ledger.ends(result.id).attempts == 1
    assert ledger.notes_now(name) == [""]
    told = [line for line in ledger.notes_now("told") if result.id in line]
    assert told == [f"{result.id} {'failed' if fail else 'succeeded'}"]


def test_cancellation_that_was_not_told_is_told_by_the_next_worker(
    project: Project, start_worker: Start, tasks: Any, ledger: Ledger
) -> None:
    """No worker was there when the run was cancelled; the first one that comes tells the result."""
    result = tasks["ends"].apply_async(("nobody there", False), countdown=6)
    Task.cancel_run_sync(result.id)

    start_worker()

    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)
    assert ledger.ends(result.id).state is RunState.CANCELLED
    assert ledger.notes_now("nobody there") == []
