"""What a function with ``ledger="off"`` does not ask, and what becomes of runs that the ledger has of it."""

from pathlib import Path

import pytest

from llmtasks import Task
from llmtasks.errors import InvalidOptionError
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, project_with, queue_length
from tests.processes import Project
from tests.waiting import wait_until

#: Servers that nobody runs: whoever asks them anything gets an error.
NO_DATABASE = "postgresql://nobody@127.0.0.1:1/none"
NO_RESULTS = "redis://127.0.0.1:1/0"

TASKS = """
    from llmtasks import task_registry
    from tests.notebook import note


    @task_registry.register(name="silent", ledger="off", ignore_result=True)
    async def silent(name):
        note(name)
"""

pytestmark = pytest.mark.redis


def test_ignored_result_costs_no_round_trip(tmp_path: Path) -> None:
    """On the asyncio pool a run whose result is ignored speaks to no result backend: here there is none."""
    with project_with(
        tmp_path, TASKS, LLMTASKS_POOL="asyncio", LLMTASKS_DATABASE_URL=NO_DATABASE, LLMTASKS_RESULT_URL=NO_RESULTS
    ) as project:
        worker = project.worker(concurrency=100)

        for _ in range(100):
            project.app.tasks["silent"].delay("silent")

        Ledger(project).notes("silent", 100)
        wait_until(lambda: queue_length(project.broker, "llmtasks.unacked") == 0, 60, "all are acknowledged")
        wait_until(lambda: worker.log().count("succeeded in") == 100, 60, "all have ended")
        assert "Error" not in worker.log()


def test_schedule_of_such_a_function_is_refused(project: Project) -> None:
    """A Task needs the ledger; the error names the function and its option."""
    project.tasks(TASKS)
    assert project.app.tasks["silent"]

    with pytest.raises(InvalidOptionError, match=r"func_name='silent': .*ledger='off'"):
        Task(func_name="silent", params={"name": "x"}, interval_minutes=1).save_sync()


TURNED_OFF = """
    from llmtasks import task_registry
    from tests.notebook import note


    @task_registry.register(name="turned", ledger="{ledger}")
    async def turned():
        note("turned")
"""


def test_run_opened_before_the_ledger_was_off_runs_once(tmp_path: Path) -> None:
    """What a Task opened for a function whose ledger is off by now is handed to Celery, and the ledger says so."""
    with project_with(tmp_path, TURNED_OFF.format(ledger="on"), LLMTASKS_POOL="asyncio", **QUICK) as project:
        project.python(
            """
            import celeryconfig
            from celery import current_app
            from llmtasks import Task
            current_app.loader.import_default_modules()
            task = Task(func_name="turned", interval_minutes=1000)
            task.save_sync()
            """
        )
        project.tasks(TURNED_OFF.format(ledger="off"))
        project.worker()
        ledger = Ledger(project)
        assert project.app.tasks["turned"]

        run = Task.get_sync("turned").execute_now_sync()

        ended = ledger.ends(run.id)
        assert (ended.state, ended.reason) == (RunState.SKIPPED, "handed to Celery")
        assert len(ledger.notes("turned", 1)) == 1
