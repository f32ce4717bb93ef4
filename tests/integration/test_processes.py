"""The processes that tests start are real, ready, restartable, and leave this process as it was."""

import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery._state
import pytest

from tests.children import lives
from tests.processes import Project
from tests.servers import Valkey
from tests.waiting import wait_until

#: Celery alone, so that a failure here is never llmtasks'.
CELERYCONFIG = """
    import os
    broker_url = os.environ["LLMTASKS_BROKER_URL"]
    result_backend = os.environ["LLMTASKS_RESULT_URL"]
    imports = os.environ["LLMTASKS_IMPORTS"].split(",")
    broker_connection_retry_on_startup = True
    beat_schedule = {"often": {"task": "add", "schedule": 0.2, "args": (1, 1)}}
"""
TASKS = """
    from celery import shared_task

    @shared_task(name="add")
    def add(x, y):
        return x + y
"""

pytestmark = pytest.mark.redis


@pytest.fixture
def project(tmp_path: Path, broker: Valkey) -> Iterator[Project]:
    project = Project(tmp_path / "project", broker=broker, database_url="sqlite://", celeryconfig=CELERYCONFIG)
    project.tasks(TASKS)
    yield project
    project.close()


def test_worker_runs_what_the_test_and_another_process_send(project: Project) -> None:
    """One worker serves the app in the test process and a Python process of the project."""
    project.worker()

    assert project.app.tasks["add"].delay(1, 2).get(timeout=60) == 3
    assert project.python("from tasks import add; print(add.delay(3, 4).get(timeout=60))") == "7\n"


def test_killed_worker_serves_again_after_its_restart(project: Project) -> None:
    """SIGKILL ends a worker and its children; a restart brings it back."""
    worker = project.worker()
    assert len(worker.family()) == 2

    worker.kill()
    assert not worker.running
    worker.restart()

    assert project.app.tasks["add"].delay(1, 2).get(timeout=60) == 3
    assert worker.terminate() == 0


def test_beat_sends_through_a_broker_that_was_restarted(project: Project, broker: Valkey) -> None:
    """The broker keeps its address and data over a restart, and beat goes on."""
    broker.kill()
    broker.start()
    beat = project.beat()

    beat.wait_for_log("Sending due task often")
    assert beat.terminate() == 0


def test_children_of_a_killed_main_process_are_gone(project: Project) -> None:
    """SIGKILL of the worker's main process alone takes its children too."""
    worker = project.worker()
    family = worker.family()

    worker.kill_main()

    wait_until(lambda: not any(lives(member) for member in family), message="its children are gone")


def test_app_in_this_process_leaves_no_trace(project: Project) -> None:
    """Directory, environment, modules, current app and shared tasks are as they were."""
    state: Any = celery._state

    def seen() -> list[object]:
        finalizers, modules = set(state._on_app_finalizers), "tasks" in sys.modules
        return [Path.cwd(), dict(os.environ), list(sys.path), state.default_app, finalizers, modules]

    before = seen()

    assert celery.current_app == project.app
    assert "add" in project.app.tasks
    project.close()

    assert seen() == before


def test_flower_answers_at_its_address(project: Project) -> None:
    """Flower listens on a loopback port of its own when it is said to be ready."""
    flower = project.flower()

    with urllib.request.urlopen(f"{flower.url}/healthcheck", timeout=30) as answer:
        assert answer.status == 200


def test_worker_that_cannot_start_shows_its_log(project: Project) -> None:
    """A worker that ends at once fails the test with what it wrote, without a wait."""
    project.tasks("raise RuntimeError('no such luck')")

    with pytest.raises(AssertionError, match="no such luck"):
        project.worker()
