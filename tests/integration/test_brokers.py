"""One body of tests for all brokers: what a run is promised does not depend on who carries its message."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord
from celery.exceptions import TaskRevokedError
from sqlalchemy import update

from llmtasks import Task, sender
from llmtasks.dispatch import cancel_run, station
from llmtasks.keeper import Keeper
from llmtasks.states import RunState
from llmtasks.store.rescue import EMPTY_QUEUE_PATIENCE
from llmtasks.store.rows import runs
from tests.conftest import or_without
from tests.ledger import QUICK, Ledger, sqlite_url
from tests.processes import CeleryProcess, Project
from tests.servers import RabbitMQ, Valkey, valkey
from tests.waiting import wait_until

TASKS = """
    import asyncio

    from llmtasks import task_registry
    from tests.notebook import gate, note, notes


    @task_registry.register(name="add", max_retries=0)
    async def add(x, y=0):
        return x + y


    @task_registry.register(name="total", max_retries=0)
    def total(numbers):
        return sum(numbers)


    @task_registry.register(name="mark", max_retries=0)
    def mark(name, text=""):
        note(name, text)


    @task_registry.register(name="passes", max_retries=1, retry_delay=0)
    async def passes(name):
        note(name)
        await gate(name)
        return "done"


    @task_registry.register(name="alone", max_retries=0, max_instances=1)
    async def alone(name):
        note(name)
        await gate(name)


    @task_registry.register(name="fails", max_retries=2, retry_delay=0)
    async def fails(name, times):
        note(name)
        if len(notes(name)) <= times:
            raise ValueError(f"broken {len(notes(name))}")
        return "done"


    @task_registry.register(name="works", max_retries=0)
    async def works(number):
        note("works", number)
        await asyncio.sleep(0.05)
"""
#: What makes an app's queues quorum queues.
QUORUM = """
task_default_queue_type = "quorum"
task_create_missing_queue_type = "quorum"
task_queue_max_priority = None
"""
#: Has our Redis transport give back soon what a killed worker held; how soon by default is measured elsewhere.
SOON = """
broker_transport_options["visibility_timeout"] = 2
"""
#: Seconds after its return within which a broker is used again: the promise is 3, and a loaded machine is slow.
BACK_WITHIN = 15
#: How many records a worker may log about one outage.
RECORDS = 20
Start = Callable[..., CeleryProcess]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the brokers.

    Attributes:
        server: What is killed and started again.
        url: The broker's URL.
        environ: What its processes find in their environment.
        settings: Lines of ``celeryconfig.py``.
    """

    name: str
    server: Valkey | RabbitMQ
    url: str
    environ: dict[str, str] = field(default_factory=dict)
    settings: str = ""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("valkey", marks=pytest.mark.redis),
        pytest.param("stock_valkey", marks=pytest.mark.redis),
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
        pytest.param("rabbitmq_quorum", marks=pytest.mark.rabbitmq),
    ],
)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    """Each broker: Valkey with our transport and with kombu's own, RabbitMQ with classic and with quorum queues."""
    name = str(request.param)
    if name.startswith("rabbitmq"):
        server: RabbitMQ = request.getfixturevalue("rabbitmq_server")
        if name == "rabbitmq":
            yield Kind(name=name, server=server, url=server.host(1))
        else:
            yield Kind(name=name, server=server, url=server.host(2), settings=QUORUM)
        return
    transport = "stock" if name.startswith("stock") else "llmtasks"
    with or_without(valkey(tmp_path_factory.mktemp("broker"), unix=True)) as redis:
        settings = SOON if transport == "llmtasks" else ""
        environ = {"LLMTASKS_REDIS_TRANSPORT": transport}
        yield Kind(name=name, server=redis, url=redis.url, environ=environ, settings=settings)


@pytest.fixture(scope="module")
def project(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project on the broker. Its results are where they are by default: in Redis, else in the database."""
    folder: Path = tmp_path_factory.mktemp(kind.name)
    broker: Any = kind.server
    project = Project(folder / "project", broker=broker, database_url=sqlite_url(folder))
    del project.environ["LLMTASKS_RESULT_URL"]
    project.environ |= {**QUICK, **kind.environ, "LLMTASKS_BROKER_URL": kind.url}
    with (project.folder / "celeryconfig.py").open("a") as file:
        file.write(kind.settings)
    project.tasks(TASKS)
    yield project
    project.close()


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    """The worker that all tests of a broker share."""
    return project.worker()


@pytest.fixture
def start_worker(project: Project) -> Iterator[Start]:
    """Start a worker of one queue; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(queue: str, *arguments: str, concurrency: int = 1) -> CeleryProcess:
            started = project.worker("-Q", queue, *arguments, concurrency=concurrency)
            stack.callback(started.close)
            return started

        yield start


def consume(project: Project, queue: str) -> None:
    """Have the shared worker consume one more queue; by a new connection, as a test may have killed the broker."""
    with project.app.connection_for_write() as connection:
        project.app.control.add_consumer(
            queue, reply=True, destination=["worker-1@test"], timeout=10, limit=1, connection=connection
        )


def waiting_messages(project: Project, queue: str) -> int | None:
    return sender.queue_length(project.app, queue)


def test_smaller_priority_numbers_start_first(
    kind: Kind, project: Project, tasks: Any, ledger: Ledger, start_worker: Start
) -> None:
    """In a backlog 1 runs before 10, and runs of the same priority keep their order."""
    if kind.name == "rabbitmq_quorum":
        pytest.skip("quorum queues have no priorities before RabbitMQ 4.0, which has two")
    sent = [
        tasks["mark"].apply_async(("order", priority), priority=priority, queue="priorities")
        for priority in (10, 5, 1, 7, 3, 2, 9, 1, 4, 8, 6)
    ]

    start_worker("priorities")

    for result in sent:
        ledger.ends(result.id)
    order = [int(line) for line in ledger.notes_now("order")]
    assert order == sorted(order)
    assert len(order) == 11


def test_run_is_cancelled_wherever_it_is(project: Project, tasks: Any, ledger: Ledger) -> None:
    """Queued, waiting for a slot, or running: it ends as cancelled, and who waits for its result is told."""
    queued = Task(func_name="mark", params={"name": "queued"}, queue="cancelled", interval_minutes=60)
    run = queued.save_sync().execute_now_sync()
    ledger.becomes(run.id, RunState.QUEUED)
    holder = tasks["alone"].delay("holder")
    ledger.notes("holder", 1)
    waiting = tasks["alone"].delay("waiting")
    ledger.becomes(waiting.id, RunState.WAITING)

    for run_id in (run.id, waiting.id, holder.id):
        cancel_run(station(project.app), run_id)
    consume(project, "cancelled")

    for run_id in (run.id, waiting.id, holder.id):
        assert ledger.ends(run_id).state is RunState.CANCELLED
    for result in (waiting, holder):
        with pytest.raises(TaskRevokedError):
            result.get(timeout=60)
    assert ledger.notes_now("queued") == ledger.notes_now("waiting") == []


def test_failed_attempts_are_followed_by_others_from_the_ledger(tasks: Any, ledger: Ledger) -> None:
    """Two failures, then a success; a run that only fails ends as failed and gives its error to who waits."""
    heals, breaks = tasks["fails"].delay("heals", 2), tasks["fails"].delay("breaks", 9)

    assert heals.get(timeout=60) == "done"
    with pytest.raises(ValueError, match="broken 3"):
        breaks.get(timeout=60)
    assert [ledger.ends(result.id).attempts for result in (heals, breaks)] == [3, 3]
    assert ledger.ends(breaks.id).state is RunState.FAILED
    assert len(ledger.notes_now("heals")) == len(ledger.notes_now("breaks")) == 3


def test_chain_and_chord_hand_results_on(tasks: Any) -> None:
    """From task to task, and from all of a group to its body: with results in Redis or in the database."""
    chained = chain(tasks["add"].s(1, 2), tasks["add"].s(3)).apply_async()
    joined = chord([tasks["add"].s(1, 1), tasks["add"].s(2, 2)], tasks["total"].s()).apply_async()

    assert chained.get(timeout=60) == 6
    assert joined.get(timeout=60) == 6


def test_messages_of_a_killed_worker_come_back(
    kind: Kind, project: Project, tasks: Any, ledger: Ledger, start_worker: Start
) -> None:
    """What it had fetched and not begun is run by another, once; what it ran gets its next attempt."""
    if kind.name == "stock_valkey":
        pytest.skip("kombu's own transport gives them back after hours; a keeper sends scheduled runs again")
    doomed = start_worker("doomed", "--prefetch-multiplier", "4")
    running = tasks["passes"].apply_async(("killed",), queue="doomed")
    ledger.notes("killed", 1)
    fetched = [tasks["mark"].apply_async(("fetched", number), queue="doomed") for number in range(3)]
    wait_until(lambda: waiting_messages(project, "doomed") == 0, 30, "all are fetched")

    doomed.kill()
    ledger.open_gate("killed")
    consume(project, "doomed")

    for result in fetched:
        assert ledger.ends(result.id).attempts == 1
    assert sorted(ledger.notes_now("fetched")) == ["0", "1", "2"]
    assert (ledger.ends(running.id).state, ledger.ends(running.id).attempts) == (RunState.SUCCEEDED, 2)


def test_broker_killed_with_runs_in_flight(
    kind: Kind, project: Project, tasks: Any, ledger: Ledger, worker: CeleryProcess
) -> None:
    """The worker lives and says little; once the broker is back it goes on at once, and each run runs once."""
    names = [f"flight {number}" for number in range(2)]
    running = [tasks["passes"].delay(name) for name in names]
    for name in names:
        ledger.notes(name, 1)
    behind = [tasks["mark"].delay("behind", number) for number in range(20)]
    task = Task(func_name="mark", params={"name": "scheduled"}, interval_minutes=60).save_sync()
    task.execute_now_sync()
    before = records(worker)

    kind.server.kill()
    ledger.open_gate(names[0])
    ledger.becomes(running[0].id, RunState.SUCCEEDED)
    said = records(worker) - before
    kind.server.start()
    back = time.monotonic()
    ledger.open_gate(names[1])

    # On the connection that the server's death broke: neither late in the outbox, nor lost.
    scheduled = ledger.run(task.execute_now_sync().id)
    assert scheduled is not None
    assert scheduled.state is not RunState.PENDING
    first = tasks["add"].delay(1, 2)
    for run_id in (first.id, scheduled.id):
        ledger.ends(run_id)
    assert time.monotonic() - back < BACK_WITHIN
    for result in [*running, *behind]:
        assert (ledger.ends(result.id).state, ledger.ends(result.id).attempts) == (RunState.SUCCEEDED, 1)
    assert first.get(timeout=60) == 3
    assert [ledger.notes_now(name) for name in names] == [[""]] * 2
    assert sorted(ledger.notes_now("behind"), key=int) == [str(number) for number in range(20)]
    assert worker.running
    assert said <= RECORDS


def records(process: CeleryProcess) -> int:
    """How many records a process has logged."""
    return sum(line.startswith("[2") for line in process.log().splitlines())


def test_worker_under_load_hands_everything_on(
    project: Project, tasks: Any, ledger: Ledger, start_worker: Start
) -> None:
    """Runs in a queue, SIGTERM in the middle, then another worker: each run was called once and succeeded."""
    first = start_worker("load", concurrency=2)
    results = [tasks["works"].apply_async((number,), queue="load") for number in range(40)]
    ledger.notes("works", 5)

    first.signal(signal.SIGTERM)
    assert first.process.wait(60) == 0
    assert len(ledger.notes_now("works")) < 40
    consume(project, "load")

    for result in results:
        run = ledger.ends(result.id)
        assert (run.state, run.attempts, run.losses) == (RunState.SUCCEEDED, 1, 0)
    assert sorted(ledger.notes_now("works"), key=int) == [str(number) for number in range(40)]


def test_delayed_runs_wait_for_their_time_and_for_nothing_else(tasks: Any, ledger: Ledger) -> None:
    """Short and long delays are kept, and more delayed runs than a worker fetches at once stop no others."""
    sent = time.monotonic()
    short = [tasks["add"].apply_async((number, 1), countdown=3) for number in range(4)]
    long = tasks["add"].apply_async((5, 1), countdown=5.2)

    assert tasks["add"].delay(1, 2).get(timeout=60) == 3
    for result in short:
        run = ledger.ends(result.id)
        assert run.state is RunState.SUCCEEDED
    assert time.monotonic() - sent >= 2.9
    assert long.get(timeout=60) == 6
    assert time.monotonic() - sent >= 5.1


def test_expired_run_is_skipped_and_revoked_run_is_cancelled(project: Project, tasks: Any, ledger: Ledger) -> None:
    """Neither is called; the ledger says what became of it, and who waits for its result is told."""
    expired = tasks["mark"].apply_async(("never",), expires=0.5, queue="late")
    revoked = tasks["mark"].apply_async(("never",), queue="late")
    kept = tasks["mark"].apply_async(("always",), expires=300, queue="late")
    with project.app.connection_for_write() as connection:
        revoked.revoke(connection=connection)
    time.sleep(0.6)  # no condition to wait for: the clock itself

    consume(project, "late")

    assert ledger.ends(expired.id).reason == "expired before it started"
    assert [ledger.ends(result.id).state for result in (expired, revoked, kept)] == [
        RunState.SKIPPED,
        RunState.CANCELLED,
        RunState.SUCCEEDED,
    ]
    for result in (expired, revoked):
        with pytest.raises(TaskRevokedError):
            result.get(timeout=60)
    assert ledger.notes_now("never") == []


def test_queued_run_whose_message_is_gone_is_sent_again(project: Project, ledger: Ledger) -> None:
    """The length of a queue is known; a keeper that finds it empty sends the queued run once more."""
    app, at = project.app, station(project.app)
    assert waiting_messages(project, "emptied") == 0
    task = Task(func_name="mark", params={"name": "emptied"}, queue="emptied", interval_minutes=60).save_sync()
    run = task.execute_now_sync()
    ledger.becomes(run.id, RunState.QUEUED)
    wait_until(lambda: waiting_messages(project, "emptied") == 1, 30, "the message is in the queue")

    with app.connection_for_write() as connection:
        app.amqp.queues["emptied"].bind(connection.default_channel).purge()
    assert waiting_messages(project, "emptied") == 0
    long_ago = at.database.now() - EMPTY_QUEUE_PATIENCE - timedelta(seconds=1)
    with at.database.transaction() as tx:
        tx.execute(update(runs).where(runs.c.id == run.id).values(published_at=long_ago))
    Keeper(at).round()

    wait_until(lambda: waiting_messages(project, "emptied"), 30, "it was sent again")
    consume(project, "emptied")
    assert (ledger.ends(run.id).state, ledger.notes_now("emptied")) == (RunState.SUCCEEDED, [""])
