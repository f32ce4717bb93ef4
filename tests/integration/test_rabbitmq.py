"""What only RabbitMQ does: it refuses queues, and closes the channel of a run that takes long."""

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Queue

from llmtasks import Task, sender
from llmtasks.errors import ConfigurationError
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, sqlite_url
from tests.processes import CeleryProcess, Project
from tests.servers import RabbitMQ
from tests.waiting import wait_until

TASKS = """
    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="mark", max_retries=0)
    def mark(name):
        note(name)


    @task_registry.register(name="passes", max_retries=1, retry_delay=0)
    async def passes(name):
        note(name)
        await gate(name)
        return "done"
"""

pytestmark = pytest.mark.rabbitmq


@pytest.fixture(scope="module")
def project(rabbitmq_server: RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project on a virtual host of its own, with results in its database."""
    folder = tmp_path_factory.mktemp("rabbitmq_only")
    broker: Any = rabbitmq_server
    project = Project(folder / "project", broker=broker, database_url=sqlite_url(folder))
    del project.environ["LLMTASKS_RESULT_URL"]
    project.environ |= {**QUICK, "LLMTASKS_BROKER_URL": rabbitmq_server.host(3)}
    project.tasks(TASKS)
    yield project
    project.close()


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    return project.worker()


@pytest.fixture
def unlike(project: Project) -> Iterator[str]:
    """A queue that somebody declared without the priorities that the app declares."""
    name = "unlike"
    with project.app.connection_for_write() as connection:
        Queue(name, routing_key=name)(connection.default_channel).declare()
        yield name
        Queue(name)(connection.default_channel).delete()


def test_queue_with_other_arguments_is_an_error_of_who_sends(unlike: str, tasks: Any, ledger: Ledger) -> None:
    """The error names the queue, what is different and what to do; the next message, to another queue, is sent."""
    with pytest.raises(ConfigurationError, match=r"inequivalent arg 'x-max-priority' for queue 'unlike'.*task_queues"):
        tasks["mark"].apply_async(("refused",), queue=unlike)

    sent = tasks["mark"].delay("sent after a refusal")
    assert ledger.ends(sent.id).state is RunState.SUCCEEDED
    assert ledger.notes_now("refused") == []


def test_run_whose_queue_is_refused_fails_and_others_do_not(unlike: str, tasks: Any, ledger: Ledger) -> None:
    """A run from the outbox ends as failed with that error, instead of waiting for a broker that is not away."""
    refused = Task(func_name="mark", params={"name": "no"}, queue=unlike, interval_minutes=60).save_sync()
    other = Task(func_name="mark", params={"name": "other"}, interval_minutes=60).save_sync()

    runs = [task.execute_now_sync() for task in (refused, other)]

    failed = ledger.becomes(runs[0].id, RunState.FAILED)
    assert "refuses: PRECONDITION_FAILED - inequivalent arg 'x-max-priority' for queue 'unlike'" in str(failed.error)
    assert ledger.ends(runs[1].id).state is RunState.SUCCEEDED


def test_worker_does_not_start_on_a_queue_with_other_arguments(unlike: str, project: Project) -> None:
    """It ends at once and says why, instead of connecting again and again."""
    with pytest.raises(AssertionError, match=r"ended with 1 before[\s\S]*ConfigurationError"):
        project.worker("-Q", unlike, pool="solo")


def test_run_may_take_longer_than_the_broker_waits_for_it(
    rabbitmq_server: RabbitMQ, worker: CeleryProcess, tasks: Any, ledger: Ledger
) -> None:
    """RabbitMQ closes the channel and gives the message out again: the worker lives, and the run runs once."""
    before = len(worker.log())
    long = tasks["passes"].delay("long")
    ledger.notes("long", 1)
    wait_until(
        lambda: "delivery acknowledgement on channel" in worker.log()[before:],
        rabbitmq_server.ACKNOWLEDGE_WITHIN + 60,
        "RabbitMQ closes the channel",
    )

    behind = tasks["mark"].delay("behind the long one")
    ledger.ends(behind.id)
    ledger.open_gate("long")

    assert long.get(timeout=60) == "done"
    run = ledger.ends(long.id)
    assert (run.state, run.attempts, run.losses) == (RunState.SUCCEEDED, 1, 0)
    assert ledger.notes_now("long") == [""]
    assert worker.running


def test_many_are_sent_one_by_one_and_a_refused_queue_is_told(unlike: str, tasks: Any, ledger: Ledger) -> None:
    """RabbitMQ confirms each message of map_delay; its refusal is the error that one message would get."""
    results = tasks["mark"].map_delay(["many 1", ("many 2",), {"name": "many 3"}])
    assert [ledger.ends(result.id).state for result in results] == [RunState.SUCCEEDED] * 3

    with pytest.raises(ConfigurationError, match=r"inequivalent arg 'x-max-priority' for queue 'unlike'.*task_queues"):
        tasks["mark"].map_delay(["a", "b"], queue=unlike)
    (sent,) = tasks["mark"].map_delay(["sent after a refusal of many"])
    assert ledger.ends(sent.id).state is RunState.SUCCEEDED


def test_length_of_a_queue_is_what_waits_in_it(project: Project, tasks: Any) -> None:
    """A queue that nobody declared has none, one with messages theirs."""
    assert sender.queue_length(project.app, "unheard of") == 0

    for _ in range(3):
        tasks["mark"].apply_async(("counted",), queue="counted")

    wait_until(lambda: sender.queue_length(project.app, "counted") == 3, 30, "three messages wait")


def test_frozen_broker_does_not_stop_who_sends(rabbitmq_server: RabbitMQ, tasks: Any, ledger: Ledger) -> None:
    """A broker that confirms nothing counts as away within seconds; the run is sent when it answers again."""
    task = Task(func_name="mark", params={"name": "frozen"}, interval_minutes=60).save_sync()
    ledger.ends(task.execute_now_sync().id)

    rabbitmq_server.process.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        run = task.execute_now_sync()
        waited = time.monotonic() - began
        pending = ledger.run(run.id)
    finally:
        rabbitmq_server.process.signal(signal.SIGCONT)

    assert waited < 30
    assert pending is not None
    assert pending.state is RunState.PENDING
    assert ledger.ends(run.id).state is RunState.SUCCEEDED
