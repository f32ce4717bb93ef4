"""llmtasks on the nodes of pytest-celery: a broker, a result backend and a worker that tests kill and restart."""

from typing import Any

import pytest
from pytest_celery import CeleryTestSetup

from tests.integration import node_tasks

pytestmark = pytest.mark.redis


@pytest.fixture
def default_worker_tasks(default_worker_tasks: set[Any]) -> set[Any]:
    """What the worker imports: pytest-celery's own tasks and ours."""
    return {*default_worker_tasks, node_tasks}


def test_nodes_answer_by_task_and_by_control(celery_setup: CeleryTestSetup) -> None:
    """Broker, backend and worker are up, and the worker answers a ping by task and one by control."""
    assert celery_setup.ready(ping=True, control=True, docker=True)
    assert len(celery_setup) == 3


def test_worker_node_runs_a_registered_function(celery_setup: CeleryTestSetup) -> None:
    """A function registered in the test's process runs in the worker, and its result comes back."""
    assert node_tasks.doubled.delay(21).get(timeout=60) == 42

    celery_setup.worker.assert_log_exists("nodes.doubled")


def test_worker_node_serves_again_after_sigkill(celery_setup: CeleryTestSetup) -> None:
    """A worker killed with SIGKILL is another process after its restart, and serves."""
    before = node_tasks.process_id.delay().get(timeout=60)

    celery_setup.worker.kill()
    assert celery_setup.worker.container.status == "exited"
    celery_setup.worker.restart()

    assert node_tasks.process_id.delay().get(timeout=60) != before


def test_message_outlives_a_restart_of_the_broker_node(celery_setup: CeleryTestSetup) -> None:
    """What was sent while no worker ran is done after the broker and the worker came back."""
    celery_setup.worker.kill()
    result = node_tasks.doubled.delay(4)

    celery_setup.broker.restart()
    celery_setup.worker.restart()

    assert result.get(timeout=60) == 8


def test_worker_node_ends_in_order_on_sigterm(celery_setup: CeleryTestSetup) -> None:
    """SIGTERM ends a worker node by a warm shutdown."""
    celery_setup.worker.kill("SIGTERM")

    celery_setup.worker.assert_log_exists("Warm shutdown")
