"""The keeper and the broker: what waits in its queue is left there, what is gone is sent again."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from llmtasks import Run, Task
from llmtasks.dispatch import station
from llmtasks.keeper import Keeper
from llmtasks.store.rows import runs
from tests.ledger import Ledger, project_with, queue_length

TASKS = """
    from llmtasks import task_registry


    @task_registry.register(name="mails", queue="mail")
    def mails():
        pass
"""

pytestmark = pytest.mark.redis


def test_run_in_a_queue_of_its_function_is_not_sent_again_while_it_waits_there(tmp_path: Path) -> None:
    """No worker consumes the queue: its message stays the only one; when the queue is lost, the run is sent again."""
    with project_with(tmp_path, TASKS) as project:
        ledger = Ledger(project)
        at = station(project.app)
        run = Task(name="mails", func_name="mails", interval_minutes=60).save_sync().execute_now_sync()
        assert ledger.until(run.id, lambda found: found.state == "queued", "sent").queue is None

        assert rounds(at, run) == 1
        assert queue_length(project.broker, "mail") == 1

        project.broker.flush()
        assert rounds(at, run) == 2
        assert queue_length(project.broker, "mail") == 1


def rounds(at: Any, run: Run) -> int:
    """Let a keeper look at a run that was sent a minute ago; returns how often it has been sent."""
    with at.database.transaction() as tx:
        tx.execute(update(runs).values(published_at=at.database.now() - timedelta(minutes=1)))
    Keeper(at).round()
    with at.database.reading() as connection:
        return int(connection.execute(runs.select().where(runs.c.id == run.id)).one().publications)
