"""Workers on our Redis transport that die, stop or lose their broker: no message is lost, none is given out twice."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection, Consumer, Queue

from tests.children import ChildProcess
from tests.ledger import Ledger, project_with, queue_length
from tests.processes import REPOSITORY, CeleryProcess, Project
from tests.servers import Valkey, valkey
from tests.waiting import wait_until

#: Plain Celery tasks: no ledger hides a message that is lost or given out twice.
TASKS = """
    from celery import shared_task
    from tests.notebook import gate_sync, note


    @shared_task(name="plain", bind=True, acks_late=True)
    def plain(self, name):
        note(name, self.request.hostname)
        gate_sync(name)
        note(f"{name} done")
"""
#: The promise: fetched and not started, back in its queue this many seconds after its worker died.
BACK_WITHIN = 15
#: What a short visibility makes of many tests: quick.
QUICK = 2
#: Fetches and acknowledges, in children that are killed some milliseconds after their first message; they say what they
#: got before they acknowledge it.
CONSUMERS = """
import os, random, signal, sys, time
import llmtasks
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub, set_event_loop

url, wanted, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
options = {"redis_transport": "llmtasks", "visibility_timeout": 1, "priority_steps": list(range(10))}

def consume():
    child = os.fork()
    if child:
        return child
    out = os.open(path, os.O_WRONLY | os.O_APPEND)
    def take(body, message):
        os.write(out, f"{body}\\n".encode())
        message.ack()
    with Connection(url, transport_options=options) as connection:
        hub = set_event_loop(Hub())
        if sys.argv[4] == "events":
            connection.register_with_event_loop(hub)
        with Consumer(connection, [Queue("q")], callbacks=[take]) as consumer:
            consumer.qos(prefetch_count=5)
            while True:
                hub.run_once() if sys.argv[4] == "events" else connection.drain_events()

open(path, "w").close()
killed = 0
while os.path.getsize(path) < wanted * 3:  # most of them
    before = os.path.getsize(path)
    child = consume()
    while os.path.getsize(path) == before:
        time.sleep(0.001)
    time.sleep(random.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    killed += 1
print("killed", killed, flush=True)
consume()
while len({*open(path)}) < wanted:
    time.sleep(0.1)
print("all arrived", flush=True)
time.sleep(60)
"""
#: Fetches 1,100 messages on kombu's event loop and stops in a callback, in the middle of what one fetch brought.
HOARDER = """
import sys, time
import llmtasks
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub, set_event_loop

def take(body, message):
    if body == 1050:
        time.sleep(1.5)
        print("holds", body, flush=True)
        time.sleep(60)

with Connection(sys.argv[1], transport_options={"redis_transport": "llmtasks"}) as connection:
    hub = set_event_loop(Hub())
    connection.register_with_event_loop(hub)
    with Consumer(connection, [Queue("q")], callbacks=[take]) as consumer:
        consumer.qos(prefetch_count=1100)
        while True:
            hub.run_once()
"""
Start = Callable[..., CeleryProcess]

pytestmark = [pytest.mark.redis, pytest.mark.fault]


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A project whose messages come back after two seconds."""
    with project_with(tmp_path, TASKS) as project:
        configure(project, f'broker_transport_options["visibility_timeout"] = {QUICK}')
        yield project


def configure(project: Project, line: str) -> None:
    with (project.folder / "celeryconfig.py").open("a") as file:
        file.write(f"{line}\n")


@pytest.fixture
def client(project: Project) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=project.broker.socket) as client:
        yield client


def send(project: Project, *names: str, **options: Any) -> None:
    """From another process: the test's own connections would not survive their server's death."""
    project.python(
        f"""
        from tasks import plain
        for name in {names!r}:
            plain.apply_async((name,), ignore_result=True, **{options!r})
        """
    )


@pytest.mark.slow
def test_messages_that_a_killed_worker_had_not_started_run_elsewhere_within_15_s(tmp_path: Path) -> None:
    """With the defaults, and each once. What it had started is the ledger's matter."""
    with project_with(tmp_path, TASKS) as project:
        ledger = Ledger(project)
        victim = project.worker("--prefetch-multiplier=8", concurrency=1)
        send(project, *(f"n{number}" for number in range(6)))
        ledger.notes("n0", 1)
        wait_until(lambda: queue_length(project.broker) == 0, message="the victim fetched all")
        other = project.worker(concurrency=1)

        victim.kill()
        killed_at = time.monotonic()
        for number in range(6):
            ledger.open_gate(f"n{number}")
        for number in range(1, 6):
            ledger.notes(f"n{number} done", 1)
        seconds = time.monotonic() - killed_at

        assert seconds <= BACK_WITHIN
        assert [ledger.notes_now(f"n{number}") for number in range(1, 6)] == [[f"{other.name}@test"]] * 5


@pytest.mark.parametrize("loop", ["events", "blocking"])
def test_consumers_killed_while_they_fetch_lose_nothing(tmp_path: Path, loop: str) -> None:
    """Dozens of them, one after the other, on each of kombu's loops: every message arrives, and none stays behind."""
    with valkey(tmp_path / "broker") as broker:
        fill(broker, 600)
        consumers = ChildProcess(
            [sys.executable, "-c", CONSUMERS, broker.url, "600", str(tmp_path / "got"), loop],
            name="consumers",
            log=tmp_path / "consumers.log",
            cwd=REPOSITORY,
        )
        try:
            consumers.wait_for_log("all arrived", 150)
            with redis.Redis(port=broker.port) as client:
                wait_until(lambda: client.hlen("llmtasks.unacked") == 0, 20, "all is acknowledged")
                assert client.llen("q") == 0
        finally:
            consumers.kill()
        got = (tmp_path / "got").read_text().split()
        assert {int(number) for number in got} == set(range(600))


def connected(broker: Valkey) -> Any:
    """A connection with our transport and its defaults."""
    return Connection(broker.url, transport_options={"redis_transport": "llmtasks"})


def fill(broker: Valkey, count: int) -> None:
    with Connection(broker.url) as connection, connection.Producer() as producer, producer.batch(max_size=500):
        for number in range(count):
            producer.publish(number, routing_key="q")


@pytest.mark.slow
def test_a_thousand_messages_that_a_killed_consumer_held_are_back_within_15_s(tmp_path: Path) -> None:
    """With the defaults: those that it was given and those that came with them, all in their order, none twice."""
    with valkey(tmp_path / "broker") as broker, redis.Redis(port=broker.port) as client:
        fill(broker, 1400)
        victim = ChildProcess(
            [sys.executable, "-c", HOARDER, broker.url],
            name="victim",
            log=tmp_path / "victim.log",
            cwd=REPOSITORY,
        )
        victim.wait_for_log("holds 1050")
        held = int(client.hlen("llmtasks.unacked"))
        assert held > 1051
        with connected(broker) as connection:
            connection.default_channel.qos.look_after()
            victim.kill()
            killed_at = time.monotonic()
            wait_until(lambda: client.llen("q") == 1400, 60, "all is back")
            assert time.monotonic() - killed_at <= BACK_WITHIN
            assert client.hlen("llmtasks.unacked") == 0
            got: list[Any] = []
            with Consumer(connection, [Queue("q")], on_message=got.append):
                while len(got) < 1400:
                    connection.drain_events(timeout=20)
            for message in got:
                message.ack()
        assert [message.decode() for message in got] == [*range(1400)]
        assert [message.delivery_info["delivery_count"] for message in got] == [2] * held + [1] * (1400 - held)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_stopped_worker_has_acknowledged_what_it_did(project: Project, client: redis.Redis, pool: str) -> None:
    """SIGTERM amid many quick tasks: each is done once, by it or by the next; nothing is left to be given out again."""
    configure(project, f'worker_pool = "{pool}"')
    ledger = Ledger(project)
    names = [f"n{number}" for number in range(80)]
    for name in names:
        ledger.open_gate(name)
    first = project.worker("--prefetch-multiplier=8", concurrency=2)
    send(project, *names)
    wait_until(lambda: ledger.notes_now("n20 done"), message="it is in the middle of it")
    first.signal(signal.SIGTERM)
    wait_until(lambda: not first.running, 60, "it ended")
    assert client.hlen("llmtasks.unacked") == 0
    project.worker(concurrency=2)

    for name in names:
        ledger.notes(f"{name} done", 1)
    wait_until(lambda: client.hlen("llmtasks.unacked") == 0, message="all is acknowledged")
    assert [len(ledger.notes_now(name)) for name in names] == [1] * 80


def test_messages_with_an_eta_make_room_for_others_and_for_no_more(project: Project, client: redis.Redis) -> None:
    """Each that waits in the worker raises the prefetch by one; the worker holds that many and one that runs."""
    ledger = Ledger(project)
    project.worker(concurrency=1)
    send(project, *(f"later{number}" for number in range(30)), countdown=60)
    wait_until(lambda: client.hlen("llmtasks.unacked") == 30, message="all wait in the worker")
    send(project, "runs", "waits", "waits too")
    ledger.notes("runs", 1)

    holds_at_most(project, client, 31, 3)
    assert queue_length(project.broker) == 2


def test_worker_with_prefetch_disabled_takes_what_it_can_run(project: Project, client: redis.Redis) -> None:
    """Celery's ``worker_disable_prefetch``: whatever the multiplier allows, no message waits in the worker."""
    configure(project, "worker_disable_prefetch = True")
    ledger = Ledger(project)
    project.worker("--prefetch-multiplier=8", concurrency=2)
    names = [f"n{number}" for number in range(8)]
    send(project, *names)
    ledger.notes("n1", 1)
    wait_until(lambda: sum(len(ledger.notes_now(name)) for name in names) == 2, message="two run")

    holds_at_most(project, client, 2, 3)
    assert queue_length(project.broker) == 6
    for name in names:
        ledger.open_gate(name)
    for name in names:
        ledger.notes(f"{name} done", 1)


def holds_at_most(project: Project, client: redis.Redis, count: int, seconds: float) -> None:
    """Assert that for some time no more than ``count`` deliveries are held."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until or client.hlen("llmtasks.unacked") > count, seconds + 30)
    assert client.hlen("llmtasks.unacked") <= count


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_living_worker_keeps_what_it_holds(project: Project, client: redis.Redis, pool: str) -> None:
    """What runs, waits or has an ETA, and what runs on while the worker shuts down: longer than the visibility."""
    configure(project, f'worker_pool = "{pool}"\nworker_enable_remote_control = False')
    ledger = Ledger(project)
    first = project.worker("--prefetch-multiplier=4", concurrency=1)
    send(project, "runs", "waits")
    ledger.notes("runs", 1)
    send(project, "later", countdown=4)
    wait_until(lambda: queue_length(project.broker) == 0, message="all is fetched")
    second = project.worker(concurrency=1)
    held = client.hgetall("llmtasks.unacked")
    assert len(held) == 3

    holds_for(client, [*held], 2 * QUICK)
    first.signal(signal.SIGTERM)
    holds_for(client, [tag for tag, kept in held.items() if b"runs" in kept], 2 * QUICK)
    names = ["runs", "waits", "later"]
    for name in names:
        ledger.open_gate(name)
    for name in names:
        ledger.notes(f"{name} done", 1)

    wait_until(lambda: client.hlen("llmtasks.unacked") == 0, message="all is acknowledged")
    assert [len(ledger.notes_now(name)) for name in names] == [1, 1, 1]
    assert second.running


def holds_for(client: redis.Redis, tags: list[bytes], seconds: float) -> None:
    """Assert that these deliveries stay held for some time."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until or not set(tags) <= set(client.hkeys("llmtasks.unacked")), seconds + 30)
    assert set(tags) <= set(client.hkeys("llmtasks.unacked"))


@pytest.mark.parametrize("consumer", ["llmtasks.worker.consumer:RunConsumer", "celery.worker.consumer:Consumer"])
def test_worker_outlives_its_broker_with_an_unacknowledged_message(
    project: Project, client: redis.Redis, consumer: str
) -> None:
    """Also Celery's own consumer, which stock kombu ends here with an AttributeError."""
    configure(project, f'worker_consumer = "{consumer}"')
    ledger = Ledger(project)
    worker = project.worker(concurrency=1)
    send(project, "during")
    ledger.notes("during", 1)

    project.broker.kill()
    ledger.open_gate("during")
    ledger.notes("during done", 1)
    project.broker.start()

    ledger.open_gate("after")
    send(project, "after")
    ledger.notes("after done", 1)
    wait_until(lambda: client.hlen("llmtasks.unacked") == 0, message="all is acknowledged")
    assert queue_length(project.broker) == 0
    assert worker.running
    assert "AttributeError" not in worker.log()
    if consumer.startswith("llmtasks"):
        assert len(ledger.notes_now("during")) == 1


def test_message_that_waited_in_a_worker_when_its_broker_went_away_comes_back(project: Project) -> None:
    """Celery forgets what it had fetched and not started; nobody goes on holding that."""
    ledger = Ledger(project)
    worker = project.worker("--prefetch-multiplier=3", concurrency=1)
    send(project, "runs", "waits")
    ledger.notes("runs", 1)
    wait_until(lambda: queue_length(project.broker) == 0, message="all is fetched")

    project.broker.restart()
    worker.wait_for_log("Connected to", 60)
    ledger.open_gate("runs")
    ledger.open_gate("waits")

    ledger.notes("waits done", 1)
    assert len(ledger.notes_now("runs")) == 1
    assert worker.running


def test_stopped_workers_message_runs_elsewhere(project: Project, client: redis.Redis) -> None:
    """A suspended worker counts as dead; when it goes on it does not take away what the other one holds."""
    ledger = Ledger(project)
    stopped = project.worker("-P", "solo", concurrency=1)
    send(project, "task")
    ledger.notes("task", 1)
    other = project.worker(concurrency=1)

    stopped.signal(signal.SIGSTOP)
    ledger.notes("task", 2)
    [tag] = client.hkeys("llmtasks.unacked")
    stopped.signal(signal.SIGCONT)
    holds_for(client, [tag], QUICK)
    ledger.open_gate("task")

    ledger.notes("task done", 2)
    wait_until(lambda: client.hlen("llmtasks.unacked") == 0, message="all is acknowledged")
    assert stopped.running
    assert other.running
