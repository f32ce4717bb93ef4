"""Broker and database away for some seconds: every process lives, says so shortly, and goes on by itself."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from llmtasks import Task
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, project_with
from tests.processes import CeleryProcess, Project
from tests.servers import DatabaseServer, valkey
from tests.waiting import wait_until

TASKS = """
    import asyncio
    import time

    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="passes", max_retries=1, retry_delay=0)
    async def passes(name):
        note(name)
        await gate(name)
        return "done"


    @task_registry.register(name="works", timeout=0.6, max_retries=0)
    def works(name):
        note(name)
        time.sleep(60)


    @task_registry.register(name="blocks", timeout=0.6, max_retries=0)
    async def blocks(name):
        note(name)
        time.sleep(60)


    @task_registry.register(name="tick", interval_minutes=0.5 / 60, max_retries=0, overlap="allow")
    def tick():
        note("tick")
"""
#: How many records a process may log about one outage.
RECORDS = 20

pytestmark = [pytest.mark.redis, pytest.mark.fault]


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    with project_with(tmp_path, TASKS, **QUICK) as project:
        yield project


@pytest.fixture
def project_on_server(tmp_path: Path, own_server: DatabaseServer) -> Iterator[Project]:
    with valkey(tmp_path / "broker", unix=True) as broker:
        project = Project(tmp_path / "project", broker=broker, database_url=own_server.create_database())
        project.environ.update(QUICK)
        project.tasks(TASKS)
        project.python("from llmtasks.dispatch import station; station().database.migrate()")
        yield project
        project.close()


def test_broker_killed_and_started_again(project: Project) -> None:
    """Runs that run go on and their ends are told afterwards; what came due meanwhile is sent from the outbox."""
    worker, beat = project.worker(), project.beat()
    ledger = Ledger(project)
    assert "passes" in project.app.tasks
    # Sent by another process: this one's connection to the results would not survive their server's death.
    running = project.python('from tasks import passes; print(passes.delay("during").id)').strip()
    ledger.notes("during", 1)
    ledger.notes("tick", 1)
    before = [records(process) for process in (worker, beat)]

    project.broker.kill()
    task = Task(func_name="passes", params={"name": "meanwhile"}, interval_minutes=60).save_sync()
    meanwhile = task.execute_now_sync()
    assert meanwhile.state is RunState.PENDING
    ledger.open_gate("during")
    ledger.open_gate("meanwhile")
    assert ledger.becomes(running, RunState.SUCCEEDED).attempts == 1
    wait_until(lambda: pending(ledger) >= 6, 60, "beat goes on while the broker is away")
    said = [records(process) - count for process, count in zip((worker, beat), before, strict=True)]
    project.broker.start()

    assert ledger.ends(meanwhile.id).state is RunState.SUCCEEDED
    assert ledger.ends(running).attempts == 1
    assert (
        project.python(f'from tasks import passes; print(passes.AsyncResult("{running}").get(timeout=50))') == "done\n"
    )
    assert ledger.notes_now("during") == [""]
    ledger.notes("tick", len(ledger.notes_now("tick")) + 2)
    assert worker.running
    assert beat.running
    assert max(said) <= RECORDS, said


def records(process: CeleryProcess) -> int:
    """How many records a process has logged that are not about a run which came and went."""
    lines = process.log().splitlines()
    return sum(line.startswith("[2") and "Task tick" not in line for line in lines)


def pending(ledger: Ledger) -> int:
    """Runs of the periodic function that wait in the outbox."""
    return sum(run.state is RunState.PENDING for run in ledger.all("tick"))


def test_database_killed_and_started_again(project_on_server: Project, own_server: DatabaseServer) -> None:
    """A run that ended meanwhile waits for the ledger and is called once; schedules go on where they were."""
    project = project_on_server
    worker, beat = project.worker(), project.beat()
    ledger = Ledger(project)
    tasks: Any = project.app.tasks
    running = tasks["passes"].delay("during")
    ledger.notes("during", 1)
    ledger.notes("tick", 1)
    processes: list[CeleryProcess] = [worker, beat]
    before = [records(process) for process in processes]

    own_server.kill()
    ledger.open_gate("during")
    sent = tasks["passes"].delay("sent meanwhile")
    ledger.open_gate("sent meanwhile")
    worker.wait_for_log("waiting for the ledger")
    beat.wait_for_log("does not answer")
    said = [records(process) - count for process, count in zip(processes, before, strict=True)]
    own_server.start()

    assert running.get(timeout=60) == "done"
    assert sent.get(timeout=60) == "done"
    run = ledger.ends(running.id)
    assert (run.state, run.attempts, run.losses) == (RunState.SUCCEEDED, 1, 0)
    assert ledger.notes_now("during") == [""]
    assert ledger.notes_now("sent meanwhile") == [""]
    ledger.notes("tick", len(ledger.notes_now("tick")) + 2)
    assert worker.running
    assert beat.running
    assert max(said) <= RECORDS, said


def test_locked_sqlite_only_delays(project: Project) -> None:
    """Another program holds SQLite's write lock longer than a lease: nobody is called lost, and it all goes on."""
    import sqlite3

    worker = project.worker()
    ledger = Ledger(project)
    tasks: Any = project.app.tasks
    running = tasks["passes"].delay("locked")
    ledger.notes("locked", 1)
    path = project.database_url.removeprefix("sqlite:///")

    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        ledger.open_gate("locked")
        with pytest.raises(AssertionError):
            wait_until(lambda: ledger.becomes(running.id, RunState.SUCCEEDED, timeout=4), 4)
        other.execute("ROLLBACK")
    other.close()

    assert running.get(timeout=60) == "done"
    run = ledger.ends(running.id)
    assert (run.attempts, run.losses) == (1, 0)
    assert ledger.notes_now("locked") == [""]
    assert worker.running


@pytest.mark.parametrize("func_name", ["works", "blocks"])
def test_limit_that_passes_before_the_function_runs_counts_from_its_start(project: Project, func_name: str) -> None:
    """The pool's signal comes while the claim waits for the ledger: the function still gets its time, and no more."""
    import sqlite3

    worker = project.worker(pool="prefork")  # the others count from the function's start
    ledger = Ledger(project)
    tasks: Any = project.app.tasks
    assert ledger.all() == []

    with contextlib.closing(sqlite3.connect(project.database_url.removeprefix("sqlite:///"))) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        result = tasks[func_name].delay("late")
        worker.wait_for_log("Soft time limit (0.6s) exceeded")
        assert ledger.notes_now("late") == []
        other.execute("ROLLBACK")

    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=25)
    run = ledger.ends(result.id)
    assert (run.state, run.attempts) == (RunState.FAILED, 1)
    assert run.run_seconds is not None
    assert run.run_seconds >= 0.5
    assert ledger.notes_now("late") == [""]


def test_frozen_broker_does_not_stop_the_ledger(project: Project) -> None:
    """A broker that hangs, instead of being away, delays messages and nothing else."""
    worker = project.worker()
    ledger = Ledger(project)
    tasks: Any = project.app.tasks
    running = tasks["passes"].delay("frozen")
    ledger.notes("frozen", 1)

    project.broker.process.signal(signal.SIGSTOP)
    try:
        ledger.open_gate("frozen")
        ledger.becomes(running.id, RunState.SUCCEEDED)
    finally:
        project.broker.process.signal(signal.SIGCONT)

    assert running.get(timeout=60) == "done"
    assert ledger.ends(running.id).attempts == 1
    assert worker.running


def test_expired_message_does_not_end_a_worker_without_its_database(
    project_on_server: Project, own_server: DatabaseServer
) -> None:
    """A message that expired while the database is away waits for it, and its run then ends as skipped."""
    project = project_on_server
    worker = project.worker()
    ledger = Ledger(project)
    tasks: Any = project.app.tasks
    own_server.kill()

    expired = tasks["passes"].apply_async(("late",), expires=-1)
    worker.wait_for_log(expired.id)
    own_server.start()

    assert ledger.ends(expired.id).state is RunState.SKIPPED
    assert worker.running
    assert ledger.notes_now("late") == []
