"""On RabbitMQ too: limited runs wait in the worker, a paused queue keeps its messages, functions run off the ledger."""

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llmtasks import Task, sender
from tests.ledger import QUICK, Ledger, sqlite_url
from tests.processes import CeleryProcess, Project
from tests.servers import RabbitMQ
from tests.waiting import wait_until

TASKS = """
    from llmtasks import task_registry
    from tests.notebook import gate, note, notes


    @task_registry.register(name="limited", max_concurrency=2, max_retries=0)
    async def limited(name, number):
        note(name, f"began {number}")
        await gate(name)
        note(name, f"ended {number}")


    @task_registry.register(name="free", max_retries=0)
    async def free(name):
        note(name)


    @task_registry.register(name="shaky", ledger="off", max_retries=1, retry_delay=0, bind=True)
    async def shaky(self, name):
        note(name, str(self.request.delivery_info["priority"]))
        if len(notes(name)) < 2:
            raise ConnectionError
"""

pytestmark = pytest.mark.rabbitmq


@pytest.fixture(scope="module", params=["asyncio", "prefork"])
def project(
    request: pytest.FixtureRequest, rabbitmq_server: RabbitMQ, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("rabbitmq_waiting")
    broker: Any = rabbitmq_server
    project = Project(folder / "project", broker=broker, database_url=sqlite_url(folder))
    del project.environ["LLMTASKS_RESULT_URL"]
    host = rabbitmq_server.host(3)
    project.environ |= {**QUICK, "LLMTASKS_BROKER_URL": host, "LLMTASKS_POOL": str(request.param)}
    project.tasks(TASKS)
    yield project
    project.close()


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    return project.worker(concurrency=4)


def test_shutdown_gives_back_what_waits(project: Project, tasks: Any, ledger: Ledger) -> None:
    """The messages of those that wait are in their queue while the others run on."""
    second = project.worker("-Q", "second", concurrency=4)
    for number in range(10):
        tasks["limited"].apply_async(("leaving", number), queue="second")
    ledger.notes("leaving", 2)
    wait_until(lambda: sender.queue_length(project.app, "second") == 0, 30, "the worker has fetched them")

    second.signal(signal.SIGTERM)

    wait_until(lambda: sender.queue_length(project.app, "second") == 8, 30, "they are with the broker")
    ledger.open_gate("leaving")
    assert second.terminate() == 0
    second.start()
    assert len(ledger.notes("leaving", 20)) == 20
    second.terminate()


def test_paused_queue_keeps_its_messages(project: Project, tasks: Any, ledger: Ledger) -> None:
    """Within a second its worker does not consume it; resumed, it does."""
    Task.pause_queue_sync("celery", by="ops")
    time.sleep(1)  # the promise
    tasks["free"].delay("queued")
    wait_until(lambda: sender.queue_length(project.app, "celery") == 1, 30, "the message stays")

    Task.resume_queue_sync("celery")

    ledger.notes("queued", 1)


def test_function_off_the_ledger_has_its_retries(project: Project, tasks: Any, ledger: Ledger) -> None:
    """Each with the priority of the first, in RabbitMQ's own numbers."""
    name = f"shaky on {project.environ['LLMTASKS_POOL']}"  # a worker that is killed now leaves it to the next one
    tasks["shaky"].apply_async((name,), priority=3)

    assert ledger.notes(name, 2) == ["7", "7"]
