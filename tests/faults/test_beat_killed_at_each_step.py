"""SIGKILL of a beat at each step of a tick, with the default settings: another beat covers it within four seconds."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import select

from llmtasks import Task
from llmtasks.store.rows import runs
from tests import mines
from tests.ledger import Ledger, project_with
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import tests.mines
    from llmtasks import task_registry


    @task_registry.register(name="counted")
    def counted():
        pass
"""
EVERY = timedelta(seconds=0.5)
#: From an instant to its message, whoever died, on a busy machine: soon enough to be the other beat's doing. Who looks
#: after queued runs without a message needs half a minute.
COVERED = timedelta(seconds=10)

pytestmark = [pytest.mark.redis, pytest.mark.fault, pytest.mark.slow]


@dataclass(frozen=True, slots=True)
class Step:
    """A place in the way of a tick."""

    event: str
    file: str
    function: str


#: In the order of a tick.
STEPS = {
    "due rows are about to be locked": Step("call", "llmtasks/store/schedules.py", "due"),
    "due rows are locked": Step("return", "llmtasks/store/schedules.py", "due"),
    "runs are opened": Step("call", "llmtasks/store/outbox.py", "put_new"),
    "messages are owed and reserved": Step("return", "llmtasks/store/runs.py", "open_many"),
    "schedules are advanced": Step("return", "llmtasks/store/schedules.py", "advance"),
    "all of it is committed": Step("return", "llmtasks/beat/tick.py", "claim_due"),
    "messages are about to be sent": Step("call", "llmtasks/sender/publishing.py", "publish"),
    "messages are sent": Step("return", "llmtasks/sender/publishing.py", "publish"),
    "messages are about to leave the outbox": Step("call", "llmtasks/store/outbox.py", "published"),
    "messages have left the outbox": Step("return", "llmtasks/store/outbox.py", "published"),
    "the tick has ended": Step("return", "llmtasks/beat/scheduler.py", "_tick"),
    "this beat is about to say that it lives": Step("call", "llmtasks/store/processes.py", "stamp"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with project_with(tmp_path_factory.mktemp("beats"), TASKS) as project:
        assert "counted" in project.app.tasks
        yield project


@pytest.fixture(scope="module")
def beats(project: Project) -> list[CeleryProcess]:
    return [project.beat(), project.beat()]


@pytest.mark.parametrize("step", STEPS)
def test_beat_killed_where(step: str, project: Project, beats: list[CeleryProcess]) -> None:
    """Every instant has one run, and its message is sent soon, by the beat that is left."""
    place, ledger = STEPS[step], Ledger(project)

    def fired() -> list[Any]:
        """When each run's instant was, when its message was sent, and how many instants it stands for."""
        columns = runs.c.scheduled_for, runs.c.published_at, runs.c.stands_for
        with ledger.database.reading() as connection:
            return list(connection.execute(select(*columns).where(runs.c.name == step).order_by(runs.c.scheduled_for)))

    for beat in beats:
        if not beat.running:
            beat.start()
            beat.wait_until_ready()
    every = EVERY / timedelta(minutes=1)
    task = Task(func_name="counted", name=step, interval_minutes=every, overlap="allow").save_sync()

    mines.lay(project.folder, event=place.event, file=place.file, function=place.function, kills="process")
    wait_until(lambda: [beat.running for beat in beats].count(False) == 1, 30, "a beat to die")
    until_then = len(fired())
    wait_until(lambda: len(fired()) >= until_then + 2, 30, "the other one to go on")
    task.pause_sync()
    wait_until(lambda: all(row.published_at for row in fired()), 30, "every message to be sent")

    assert max(row.published_at - row.scheduled_for for row in fired()) < COVERED
    for before, after in pairwise(fired()):
        assert after.scheduled_for - before.scheduled_for == EVERY * after.stands_for
