"""llmtasks on the nodes of pytest-celery: a broker, a result backend and a worker that tests kill and restart."""

from types import ModuleType
from typing import Any

import pytest
from pytest_celery import CeleryTestSetup

import llmtasks
from tests.integration import node_app, node_tasks
from tests.waiting import wait_until

pytestmark = pytest.mark.redis


@pytest.fixture
def with_llmtasks(request: pytest.FixtureRequest) -> bool:
    """Whether the worker node can import llmtasks: the image that pytest-celery builds has Celery only."""
    return not request.config.getoption("--docker")


@pytest.fixture
def default_worker_app_module(default_worker_app_module: ModuleType, with_llmtasks: bool) -> ModuleType:
    """The module with the worker's app."""
    return node_app if with_llmtasks else default_worker_app_module


@pytest.fixture
def default_worker_tasks(default_worker_tasks: set[Any], with_llmtasks: bool) -> set[Any]:
    """What the worker imports: pytest-celery's own tasks and ours."""
    return {*default_worker_tasks, node_tasks} if with_llmtasks else default_worker_tasks


@pytest.fixture
def nodes(celery_setup: CeleryTestSetup, with_llmtasks: bool) -> CeleryTestSetup:
    """Nodes that run registered functions, and an app here that sends to them."""
    if not with_llmtasks:
        pytest.skip("the worker image of pytest-celery has no llmtasks")
    llmtasks.install(celery_setup.app)
    return celery_setup


def test_nodes_answer_by_task_and_by_control(celery_setup: CeleryTestSetup) -> None:
    """Broker, backend and worker are up, and the worker answers a ping by task and one by control."""
    assert celery_setup.ready(ping=True, control=True, docker=True)
    assert len(celery_setup) == 3


def test_worker_node_runs_a_registered_async_function(nodes: CeleryTestSetup) -> None:
    """An ``async def`` function registered in the test's process runs in the worker, and its result comes back."""
    assert node_tasks.doubled.delay(21).get(timeout=60) == 42

    nodes.worker.assert_log_exists("nodes.doubled")


def test_worker_node_serves_again_after_sigkill(nodes: CeleryTestSetup) -> None:
    """A worker killed with SIGKILL is another process after its restart, and serves."""
    before = node_tasks.worker_pid.delay().get(timeout=60)

    nodes.worker.kill()
    assert nodes.worker.container.status == "exited"
    nodes.worker.restart()

    assert node_tasks.worker_pid.delay().get(timeout=60) != before


def test_run_outlives_a_restart_of_the_broker_node(nodes: CeleryTestSetup) -> None:
    """What was sent while no worker ran is done after the broker and the worker came back."""
    nodes.worker.kill()
    result = node_tasks.doubled.delay(4)

    nodes.broker.restart()
    nodes.worker.restart()

    assert result.get(timeout=60) == 8


def test_worker_node_ends_in_order_on_sigterm(nodes: CeleryTestSetup) -> None:
    """SIGTERM ends a worker node by a warm shutdown."""
    nodes.worker.kill("SIGTERM")

    nodes.worker.assert_log_exists("Warm shutdown")
    wait_until(lambda: nodes.worker.container.status == "exited", message="the worker node ended")
