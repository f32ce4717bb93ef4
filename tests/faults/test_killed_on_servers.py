"""SIGKILL of a worker whose ledger is on a server: the same promises as on SQLite, with slots and retries."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtasks.dispatch import station
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger
from tests.processes import Project
from tests.servers import DatabaseServer, valkey

TASKS = """
    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="passes", max_retries=3, retry_delay=0)
    async def passes(name):
        note(name)
        await gate(name)
        return name


    @task_registry.register(name="alone", max_instances=1, max_retries=3, retry_delay=0)
    async def alone(name):
        note(name)
        await gate(name)
        return name


    @task_registry.register(name="fails_once", bind=True, max_retries=1, retry_delay=0)
    def fails_once(self, name):
        note(name)
        if not self.request.retries:
            raise ValueError("龍 💥")
        return name
"""

pytestmark = [pytest.mark.redis, pytest.mark.fault]


@pytest.fixture
def project(tmp_path: Path, database_server: DatabaseServer) -> Iterator[Project]:
    """A project with a ledger on a server."""
    url = database_server.create_database()
    with valkey(tmp_path / "broker", unix=True) as broker:
        project = Project(tmp_path / "project", broker=broker, database_url=url)
        project.environ.update(QUICK)
        project.tasks(TASKS)
        try:
            assert project.app
            station().database.migrate()
            yield project
        finally:
            project.close()
    database_server.drop_database(url)


def test_runs_of_a_killed_worker_are_run_again_and_no_slot_is_lost(project: Project) -> None:
    """Another worker ends what ran and what waited for a slot; nothing is called more often than it must be."""
    ledger = Ledger(project)
    tasks: Any = project.app.tasks
    victim = project.worker(concurrency=2)
    running, holder = tasks["passes"].delay("running"), tasks["alone"].delay("holder")
    ledger.notes("running", 1)
    ledger.notes("holder", 1)
    waiting = tasks["alone"].delay("waiting")

    victim.kill()
    project.worker(concurrency=2)
    retried = tasks["fails_once"].delay("retried")
    ledger.notes("running", 2)
    for name in ("running", "holder", "waiting"):
        ledger.open_gate(name)

    results = {"running": running, "holder": holder, "waiting": waiting, "retried": retried}
    assert {name: result.get(timeout=60) for name, result in results.items()} == {name: name for name in results}
    ends = {name: ledger.ends(result.id) for name, result in results.items()}
    assert {run.state for run in ends.values()} == {RunState.SUCCEEDED}
    assert {name: run.losses for name, run in ends.items()} == {"running": 1, "holder": 1, "waiting": 0, "retried": 0}
    calls = {name: len(ledger.notes_now(name)) for name in results}
    assert calls == {"running": 2, "holder": 2, "waiting": 1, "retried": 2}
