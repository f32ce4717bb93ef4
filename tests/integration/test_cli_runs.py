"""The command line with a worker that does what it asks for."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtasks.states import RunState
from tests.ledger import Ledger, project_with
from tests.processes import Project
from tests.waiting import wait_until

pytestmark = [pytest.mark.redis, pytest.mark.slow]

PROGRAM = str(Path(sys.executable).with_name("llmtasks"))
TASKS = """
    import asyncio
    from llmtasks.registry import task_registry
    from tests.notebook import note

    @task_registry.register(name="add")
    async def add(x: int, y: int = 2):
        return {"sum": x + y}

    @task_registry.register(name="fails", max_retries=0)
    def fails():
        raise ValueError("no such page")

    @task_registry.register(name="sleeps")
    async def sleeps():
        note("sleeps")
        await asyncio.sleep(600)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with project_with(tmp_path_factory.mktemp("cli"), TASKS) as project:
        project.worker()
        yield project


def test_run_waits_for_the_result(project: Project) -> None:
    """stdout has the result alone, as JSON; stderr what happens meanwhile."""
    done = project.run([PROGRAM, "run", "add", "--params", '{"x": 1}', "--wait"])

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"sum": 3}
    assert " of add is succeeded" in done.stderr


def test_failed_run_that_is_waited_for_is_exit_code_1(project: Project) -> None:
    """The traceback is on stderr; with --json the document has it."""
    done = project.run([PROGRAM, "run", "fails", "--wait"])
    document = project.run([PROGRAM, "run", "fails", "--wait", "--json"])

    assert (done.returncode, done.stdout) == (1, "")
    assert "ValueError: no such page" in done.stderr
    assert document.returncode == 1
    assert json.loads(document.stdout)["error"] == "ValueError: no such page"


def test_run_that_runs_is_cancelled(project: Project) -> None:
    """The worker cancels the coroutine soon after the command."""
    sent = json.loads(project.run([PROGRAM, "run", "sleeps", "--json"]).stdout)
    ledger = Ledger(project)
    ledger.notes("sleeps", 1)

    done = project.run([sys.executable, "-m", "celery", "llmtasks", "cancel", sent["id"]])

    assert done.returncode == 0, done.stderr
    assert ledger.becomes(sent["id"], RunState.CANCELLED).reason == "cancelled from the command line"


def test_plain_delayed_run_is_listed(project: Project) -> None:
    """A run of .delay() is in the list from its first start on."""
    sent = project.app.tasks["add"].delay(4)

    def listed() -> list[str]:
        return [run["id"] for run in json.loads(project.run([PROGRAM, "runs", "--func", "add", "--json"]).stdout)]

    wait_until(lambda: sent.id in listed(), 60, "the run is listed", interval=0.5)
