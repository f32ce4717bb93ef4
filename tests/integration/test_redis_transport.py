"""Our Redis transport on a real Valkey: order, holding, giving back, and living beside stock kombu."""

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection, Consumer, Exchange, Queue
from kombu.asynchronous import Hub, set_event_loop
from kombu.asynchronous.timer import Timer
from kombu.transport import redis as stock

from llmtasks.broker import upkeep
from llmtasks.broker.fetching import BATCH, BATCH_BYTES, UNREADABLE
from llmtasks.broker.redis import Channel
from llmtasks.errors import InvalidOptionError
from llmtasks.redis_options import REDIS_OPTIONS
from tests.children import ChildProcess
from tests.conftest import or_without
from tests.processes import REPOSITORY, Project
from tests.servers import Valkey, valkey
from tests.waiting import wait_until

pytestmark = pytest.mark.redis

#: Fetches without an end, says what, and acknowledges nothing; at SIGUSR1 everything, and gives it back too.
HOLDER = """
import signal, sys
import llmtasks
from kombu import Connection, Consumer, Queue

held = []

def hold(body, message):
    held.append(message)
    print("holds", body, flush=True)

def let_go(*_):
    for message in held:
        message.channel.basic_ack(message.delivery_tag)
        message.channel.basic_reject(message.delivery_tag, requeue=True)
    print("let go", flush=True)

signal.signal(signal.SIGUSR1, let_go)
options = {"redis_transport": "llmtasks", "visibility_timeout": 1, "priority_steps": list(range(10))}
with Connection(sys.argv[1], transport_options=options) as connection:
    with Consumer(connection, [Queue("q")], callbacks=[hold]):
        while True:
            connection.drain_events()
"""


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with or_without(valkey(tmp_path_factory.mktemp("transport"))) as server:
        yield server


@pytest.fixture
def server(running_server: Valkey) -> Valkey:
    """A server that is empty before each test."""
    running_server.flush()
    return running_server


@pytest.fixture
def client(server: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port) as client:
        yield client


@pytest.fixture
def holder(server: Valkey, tmp_path: Path) -> Iterator[ChildProcess]:
    """A process that fetches all messages and keeps them, with a visibility of one second."""
    process = ChildProcess(
        [sys.executable, "-c", HOLDER, server.url], name="holder", log=tmp_path / "holder.log", cwd=REPOSITORY
    )
    yield process
    process.close()


@contextmanager
def connect(server: Valkey, transport: str = "llmtasks", database: int = 0, **options: Any) -> Iterator[Any]:
    """A connection with one of the two transports and the options that its workers have."""
    options = {**REDIS_OPTIONS[transport], **options}
    with Connection(server.database(database), transport_options=options) as connection:
        yield connection


def publish(connection: Any, *bodies: object, queue: str = "q", priority: int = 0) -> None:
    producer = connection.Producer()
    for body in bodies:
        producer.publish(body, routing_key=queue, priority=priority)


def receive(connection: Any, count: int, *queues: str, **options: Any) -> list[Any]:
    """The next messages, not acknowledged."""
    got: list[Any] = []
    wanted = [Queue(name) for name in queues or ("q",)]
    with Consumer(connection, wanted, callbacks=[lambda body, message: got.append(message)], **options):
        while len(got) < count:
            connection.drain_events(timeout=20)
    return got


def bodies(messages: list[Any]) -> list[Any]:
    return [message.decode() for message in messages]


def settle(messages: list[Any]) -> None:
    for message in messages:
        message.ack()


def test_ten_priorities_go_before_the_order_of_queues(server: Valkey) -> None:
    """All of one priority come, first queue first, before any of the next; those of one queue in the order sent."""
    with connect(server) as connection:
        for priority in (9, 4, 5, 0):
            publish(connection, f"second {priority}", queue="second", priority=priority)
            publish(connection, f"first {priority}", f"first {priority} later", queue="first", priority=priority)

        got = receive(connection, 12, "first", "second")
        settle(got)

    expected = [[f"first {p}", f"first {p} later", f"second {p}"] for p in (0, 4, 5, 9)]
    assert bodies(got) == [body for group in expected for body in group]


def test_idle_consumer_is_woken(server: Valkey) -> None:
    """It asks nothing for a minute, and gets a message before that: one by one and in batches."""
    with connect(server) as consuming, connect(server) as producing:
        never_look(consuming)
        threading.Timer(0.5, publish, (producing, "one")).start()
        assert bodies(receive(consuming, 1)) == ["one"]

        def send_batch() -> None:
            with producing.Producer() as producer, producer.batch(max_size=10):
                publish_with(producer, "two", "three")

        threading.Timer(0.5, send_batch).start()
        assert bodies(receive(consuming, 2)) == ["two", "three"]


def never_look(connection: Any) -> None:
    """Let an idle consumer look for itself after a minute only: what comes earlier came by a wake."""
    connection.transport.brpop_timeout = 60


def publish_with(producer: Any, *bodies: object) -> None:
    for body in bodies:
        producer.publish(body, routing_key="q")


def test_message_that_one_consumer_has_no_room_for_wakes_another(server: Valkey) -> None:
    """Two messages and one wake: who takes the first and is full passes the wake on."""
    with connect(server) as one, connect(server) as two:
        got: list[tuple[str, Any]] = []
        threads = []
        stop = threading.Event()

        def consume(name: str, connection: Any) -> None:
            queue = Queue("q")
            consumer = Consumer(connection, [queue], callbacks=[lambda body, message: got.append((name, body))])
            consumer.qos(prefetch_count=1)
            with consumer:
                while not stop.is_set():
                    with suppress(socket.timeout):
                        connection.drain_events(timeout=0.2)

        for name, connection in (("one", one), ("two", two)):
            never_look(connection)
            threads.append(threading.Thread(target=consume, args=(name, connection)))
            threads[-1].start()
        with connect(server) as producing, producing.Producer() as producer, producer.batch(max_size=10):
            publish_with(producer, "a", "b")
        try:
            wait_until(lambda: len(got) == 2, 20, "both messages were fetched")
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    assert sorted(got, key=lambda item: str(item[1])) in ([("one", "a"), ("two", "b")], [("two", "a"), ("one", "b")])


@pytest.mark.parametrize(("producer", "consumer"), [("stock", "llmtasks"), ("llmtasks", "stock")])
def test_stock_kombu_works_on_the_same_queues(server: Valkey, producer: str, consumer: str) -> None:
    """Either may send and either may fetch; both count and purge the same messages."""
    with connect(server, producer) as producing, connect(server, consumer) as consuming:
        kinds = [type(connection.default_channel) for connection in (producing, consuming)]
        assert set(kinds) == {Channel, stock.Channel}

        publish(producing, "low", priority=7)
        publish(producing, "high", priority=2)
        queues = [Queue("q")(connection.default_channel) for connection in (producing, consuming)]
        assert [queue.queue_declare(passive=True).message_count for queue in queues] == [2, 2]
        got = receive(consuming, 2)
        assert bodies(got) == ["high", "low"]
        settle(got)

        publish(producing, "gone", priority=3)
        assert queues[1].purge() == 1
        assert queues[0].get() is None


def test_each_kind_of_consumer_restores_its_own_messages(
    server: Valkey, client: redis.Redis, holder: ChildProcess
) -> None:
    """A stock consumer stamps once: ours do not take its messages away, however short their visibility is."""
    with connect(server, "stock") as old, connect(server) as producing:
        publish(producing, "held by stock")
        held = receive(old, 1)
        publish(producing, "fetched by ours")
        holder.wait_for_log("holds fetched by ours")
        holder.kill()

        with connect(server, visibility_timeout=1) as connection:
            assert bodies(receive(connection, 1)) == ["fetched by ours"]
            assert client.hlen("unacked") == 1
            settle(held)
    assert client.hlen("unacked") == 0


def test_held_message_stays_with_its_living_holder(server: Valkey, client: redis.Redis, holder: ChildProcess) -> None:
    """However long it holds it, here several times the visibility, without being looked after by its main thread."""
    with connect(server, visibility_timeout=1) as other:
        publish(other, "long")
        holder.wait_for_log("holds long")
        # The holder's main thread now sleeps in the kernel, as a worker's does in a long call.
        with pytest.raises(socket.timeout), Consumer(other, [Queue("q")], callbacks=[]):
            other.drain_events(timeout=4)
        assert client.hlen("llmtasks.unacked") == 1


def test_killed_holders_messages_come_back_once_and_first(
    server: Valkey, client: redis.Redis, holder: ChildProcess
) -> None:
    """To the front of their queue, in their order, with their priority, marked, by one of many who look for them."""
    with connect(server, visibility_timeout=1) as one, connect(server, visibility_timeout=1) as two:
        publish(one, "a", "b", priority=4)
        holder.wait_for_log("holds b")
        publish(one, "first of all", priority=0)
        holder.wait_for_log("holds first of all")
        holder.kill()
        publish(one, "new", priority=4)
        publish(one, "last", priority=5)
        for connection in (one, two):  # both look, neither fetches
            connection.default_channel.qos.look_after()
        wait_until(lambda: client.hlen("llmtasks.unacked") == 0, 20, "all is back")

        got = receive(two, 5)
        assert bodies(got) == ["first of all", "a", "b", "new", "last"]
        assert [bool(message.headers.get("redelivered")) for message in got] == [True, True, True, False, False]
        assert all(message.delivery_info.get("redelivered") for message in got[:3])
        settle(got)
        assert client.keys("llmtasks.unacked*") == []


def test_late_holder_does_not_touch_the_next_delivery(
    server: Valkey, client: redis.Redis, holder: ChildProcess
) -> None:
    """What a suspended consumer does after its message went to somebody else changes nothing for that one."""
    with connect(server, visibility_timeout=1) as other:
        publish(other, "x")
        holder.wait_for_log("holds x")
        holder.signal(signal.SIGSTOP)
        [taken_over] = receive(other, 1)

        holder.signal(signal.SIGCONT)
        holder.signal(signal.SIGUSR1)
        holder.wait_for_log("let go")
        assert client.hkeys("llmtasks.unacked") == [taken_over.delivery_tag.encode()]
        assert client.llen("q") == 0
        taken_over.ack()
        assert client.hlen("llmtasks.unacked") == 0


def test_rejected_and_returned_messages(server: Valkey, client: redis.Redis) -> None:
    """A rejected one is gone or goes to the end of its queue; closing puts what is held back to the front, in order."""
    with connect(server) as connection:
        publish(connection, "a", "b", "c", "d", "e", priority=3)
        a, b, *_ = receive(connection, 4)
        a.reject()
        b.requeue()

    assert client.hlen("llmtasks.unacked") == 0
    with connect(server) as connection:
        got = receive(connection, 4)
        settle(got)
    assert bodies(got) == ["c", "d", "e", "b"]


def test_fetch_that_is_under_way_when_its_consumer_is_cancelled_goes_back(server: Valkey, client: redis.Redis) -> None:
    """To the front of its queue; the same when the channel is closed instead."""
    for end in ("cancel", "close"):
        with connect(server) as connection:
            publish(connection, "a", "b")
            consumer = Consumer(connection, [Queue("q")], callbacks=[])
            consumer.consume()
            connection.transport.cycle.on_poll_start()  # asks
            wait_until(lambda: client.llen("q") == 1, message="the fetch was answered")
            if end == "cancel":
                consumer.cancel()
                with pytest.raises(socket.timeout):
                    connection.drain_events(timeout=0.5)
            else:
                connection.default_channel.close()
            assert client.llen("q") == 2
        with connect(server) as connection:
            got = receive(connection, 2)
            assert bodies(got) == ["a", "b"]
            settle(got)


def test_basic_get_fetches_without_loss_too(server: Valkey, client: redis.Redis) -> None:
    """With acknowledgement it is held, without it is forgotten; an empty queue gives None."""
    with connect(server) as connection:
        publish(connection, "a", "b")
        queue = Queue("q")(connection.default_channel)
        first = queue.get()
        assert client.hlen("llmtasks.unacked") == 1
        assert bodies([first, queue.get(no_ack=True)]) == ["a", "b"]
        assert client.hlen("llmtasks.unacked") == 1
        first.ack()
        assert queue.get() is None
    assert client.hlen("llmtasks.unacked") == 0


def test_consumer_without_acknowledgements_leaves_nothing_behind(server: Valkey, client: redis.Redis) -> None:
    """As replies of remote control are consumed."""
    with connect(server) as connection:
        publish(connection, "a", "b")
        assert bodies(receive(connection, 2, no_ack=True)) == ["a", "b"]
        assert client.hlen("llmtasks.unacked") == 0


def test_fanout_reaches_every_consumer(server: Valkey) -> None:
    """Events and remote control go past the queues, as in stock kombu, and also between both kinds."""
    exchange = Exchange("news", type="fanout")
    with connect(server) as ours, connect(server, "stock") as theirs:
        got: list[tuple[str, Any]] = []
        consumers = []
        for name, connection in (("ours", ours), ("theirs", theirs)):
            queue = Queue(f"news.{name}", exchange, auto_delete=True)
            consumers.append(
                Consumer(connection, [queue], callbacks=[lambda body, message, name=name: got.append((name, body))])
            )
            consumers[-1].consume()
            with suppress(socket.timeout):  # subscribes
                connection.drain_events(timeout=0.3)
        for sender in (ours, theirs):
            sender.Producer().publish("hello", exchange=exchange, declare=[exchange])

        def received() -> bool:
            for connection in (ours, theirs):
                with suppress(socket.timeout):
                    connection.drain_events(timeout=0.1)
            return len(got) == 4

        wait_until(received, 20, "both heard both")
    assert sorted(got) == [("ours", "hello")] * 2 + [("theirs", "hello")] * 2


def test_key_prefix_and_database_are_kept(server: Valkey) -> None:
    """Every key has the prefix and is in the URL's database; fetching, holding and giving back work with both."""
    options: dict[str, Any] = {"global_keyprefix": "shop:", "visibility_timeout": 1, "database": 3}
    with redis.Redis(port=server.port, db=3) as client:
        with connect(server, **options) as connection:
            publish(connection, "a", "b", priority=6)
            first, second = receive(connection, 2)
            first.ack()
            assert {key.split(b":")[0] for key in client.scan_iter()} == {b"shop"}
            assert client.hlen("shop:llmtasks.unacked") == 1
            second.requeue()
            client.hset("shop:llmtasks.unacked", "dead", client.rpop("shop:q\x06\x166") and kept("shop:q\x06\x166"))
            client.zadd("shop:llmtasks.unacked_index", {"dead": 1})
            assert bodies(receive(connection, 1)) == ["lost and found"]
        with connect(server, "stock", **options) as connection:
            assert bodies(receive(connection, 1)) == ["lost and found"]


def kept(key: str) -> str:
    """What a consumer that died wrote down of a message: see ``scripts.FETCH``."""
    info = {"exchange": "", "routing_key": "q"}
    properties = {"delivery_tag": "x", "delivery_info": info, "body_encoding": "utf-8"}
    message = {"body": '"lost and found"', "content-type": "application/json", "headers": {}, "properties": properties}
    return f"{len(key)}:{key}{json.dumps(message)}"


def test_what_is_no_message_is_set_aside(server: Valkey, client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """It is said and kept, and does not stop the messages behind it."""
    client.lpush("q", "{not json", '{"no": "properties"}')
    with connect(server) as connection:
        publish(connection, "good")
        got = receive(connection, 1)
        assert bodies(got) == ["good"]
        settle(got)

    assert client.lrange(UNREADABLE, 0, -1) == [b"{not json", b'{"no": "properties"}']
    assert client.keys("llmtasks.unacked*") == []
    said = [record.getMessage() for record in caplog.records if UNREADABLE in record.getMessage()]
    assert len(said) == 2
    assert "'{not json'" in said[0]


def test_acknowledgement_without_the_server_is_made_up_for(tmp_path: Path) -> None:
    """It raises nothing, and the message does not come again when the server is back."""
    with valkey(tmp_path / "own", unix=True) as own, connect(own, visibility_timeout=2) as connection:
        publish(connection, "a", "b")
        a, b = receive(connection, 2)
        own.kill()
        a.ack()
        b.requeue()
        own.start()
        with connect(own, visibility_timeout=2) as again:
            assert bodies(receive(again, 1)) == ["b"]
            with redis.Redis(unix_socket_path=own.socket) as client:
                assert (client.llen("q"), client.hlen("llmtasks.unacked")) == (0, 1)


def test_nothing_is_restored_until_owners_could_stamp_again(tmp_path: Path) -> None:
    """After an outage longer than the visibility every stamp is old, and yet whoever is alive keeps what it holds."""
    with valkey(tmp_path / "own", unix=True) as own:
        patient = redis.Redis(unix_socket_path=own.socket, socket_timeout=60)
        two = connect(own, visibility_timeout=2), connect(own, visibility_timeout=2)
        with patient as client, two[0] as holding, two[1] as looking:
            publish(holding, "a")
            [held] = receive(holding, 1)
            looking.default_channel.qos.look_after()
            own.process.signal(signal.SIGSTOP)
            threading.Timer(4, own.process.signal, (signal.SIGCONT,)).start()
            client.ping()  # answered when it goes on
            with pytest.raises(socket.timeout), Consumer(looking, [Queue("q")], callbacks=[]):
                looking.drain_events(timeout=3)
            assert client.hkeys("llmtasks.unacked") == [held.delivery_tag.encode()]


# On kombu's event loop, which fetches and acknowledges many messages at once.


class Loop:
    """kombu's event loop, turned by the test, with a consumer of some queues on it."""

    def __init__(self, connection: Any, *queues: str, prefetch: int = 0, take: Callable[[Any], object] | None = None):
        self.hub = Hub(Timer(max_interval=10.0))  # as in Celery's worker
        set_event_loop(self.hub)
        self.connection = connection
        self.got: list[Any] = []
        connection.register_with_event_loop(self.hub)
        wanted = [Queue(name) for name in queues or ("q",)]
        self.consumer = Consumer(connection, wanted, on_message=take or self.got.append)
        self.consumer.qos(prefetch_count=prefetch)
        self.consumer.consume()

    def turn_until(self, condition: Callable[[], object], timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s; got {bodies(self.got)}"
            self.hub.run_once()

    def warm_up(self) -> None:
        """Fetch and acknowledge until a fetch may bring as many messages as ever, and leave none behind."""
        publish_batch(self.connection, *range(4 * BATCH), queue="q")
        self.turn_until(lambda: len(self.got) == 4 * BATCH)
        settle(self.got)
        self.got.clear()
        channel = self.connection.default_channel
        self.turn_until(lambda: channel._idle and channel._in_poll)

    def ask(self, client: redis.Redis, count: int) -> None:
        """Have the next fetch answered, not read; it brings ``count`` messages."""
        channel = self.connection.default_channel
        before = client.hlen("llmtasks.unacked")
        self.turn_until(lambda: not channel._in_poll)
        self.connection.transport.cycle.on_poll_start()
        wait_until(lambda: client.hlen("llmtasks.unacked") == before + count, message="the fetch was answered")


@pytest.fixture
def loop_on() -> Iterator[Callable[..., Loop]]:
    """Makes an event loop, which ends with the test."""
    loops: list[Loop] = []

    def make(*args: Any, **kwargs: Any) -> Loop:
        loops.append(Loop(*args, **kwargs))
        return loops[-1]

    yield make
    for loop in loops:
        loop.hub.close()


@pytest.fixture
def no_upkeep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread beside a consumer looks once and then for a minute not again: it makes nothing up."""
    monkeypatch.setattr(upkeep, "TICK", 60.0)


#: An option with `no_upkeep`.
SLOW: dict[str, Any] = {"visibility_timeout": 600}


def publish_batch(connection: Any, *bodies: object, queue: str = "q", priority: int = 0) -> None:
    with connection.Producer() as producer, producer.batch(max_size=500):
        for body in bodies:
            producer.publish(body, routing_key=queue, priority=priority)


def test_event_loop_fetches_many_and_never_holds_more_than_the_prefetch(
    server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop]
) -> None:
    """Neither in the worker nor as the server counts it, while messages are acknowledged in lumps of any size."""
    with connect(server) as connection:
        publish_batch(connection, *range(1000))
        waiting: list[Any] = []
        most, turns = 0, 0

        def take(message: Any) -> None:
            nonlocal most
            waiting.append(message)
            most = max(most, len(waiting), client.hlen("llmtasks.unacked"))

        loop = loop_on(connection, prefetch=70, take=take)
        left = 1000
        while left:
            loop.turn_until(lambda full=min(70, left): len(waiting) == full)
            for message in waiting[: 1 + turns * 7 % 70]:
                message.ack()
                waiting.pop(0)
                left -= 1
            turns += 1
        loop.turn_until(lambda: client.hlen("llmtasks.unacked") == 0)

    assert most == 70


def test_number_of_commands_is_far_below_that_of_messages(
    server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop]
) -> None:
    """Fetches and acknowledgements of 2,000 messages together need a twentieth of that."""
    with connect(server) as connection:
        publish_batch(connection, *range(2000))
        left = 2000

        def take(message: Any) -> None:
            nonlocal left
            left -= 1
            message.ack()

        client.config_resetstat()
        loop_on(connection, prefetch=500, take=take).turn_until(lambda: left == 0)
        scripts_run = client.info("commandstats")["cmdstat_eval"]["calls"]

    assert scripts_run < 100


def test_priorities_order_what_is_in_the_broker(server: Valkey, loop_on: Callable[..., Loop]) -> None:
    """Across all queues, within one fetch and from one to the next; what came while the worker was full too."""
    with connect(server) as connection:
        for priority in (9, 5, 0):
            for queue in ("first", "second"):
                bodies_of = [f"{priority} {queue} {number:03}" for number in range(40)]
                publish_batch(connection, *bodies_of, queue=queue, priority=priority)
        loop = loop_on(connection, "first", "second", prefetch=60)
        loop.turn_until(lambda: len(loop.got) == 60)
        publish_batch(connection, "urgent", queue="second", priority=0)
        publish_batch(connection, "later", queue="first", priority=1)
        settle(loop.got)
        loop.turn_until(lambda: len(loop.got) == 120)
        settle(loop.got[60:])

    sent = {p: [f"{p} {queue} {n:03}" for queue in ("first", "second") for n in range(40)] for p in (0, 5, 9)}
    assert bodies(loop.got) == [*sent[0], "urgent", "later", *sent[5][:38]]


def test_queues_of_one_priority_take_turns_where_they_are_to(server: Valkey, loop_on: Callable[..., Loop]) -> None:
    """With ``round_robin``, kombu's own default, also within one fetch."""
    with connect(server, queue_order_strategy="round_robin") as connection:
        loop = loop_on(connection, "a", "b", "q")
        loop.warm_up()
        publish_batch(connection, *["a"] * 30, queue="a")
        publish_batch(connection, *["b"] * 20, queue="b")
        loop.turn_until(lambda: len(loop.got) == 50)
        settle(loop.got)

    assert sorted(bodies(loop.got)[:2]) == ["a", "b"]
    assert bodies(loop.got)[:40] in (["a", "b"] * 20, ["b", "a"] * 20)


def test_large_messages_come_in_smaller_lots(server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop]) -> None:
    """A fetch ends behind the message with which it reaches a megabyte, and nothing waits for a wake after that."""
    with connect(server) as connection:
        never_look(connection)
        loop = loop_on(connection)
        loop.warm_up()
        publish_batch(connection, *["x" * (BATCH_BYTES // 2)] * 5)
        loop.ask(client, 2)
        loop.turn_until(lambda: len(loop.got) == 5)
        settle(loop.got)


@pytest.mark.usefixtures("no_upkeep")
def test_acknowledgements_are_sent_before_the_loop_sleeps(
    server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop]
) -> None:
    """Those of a timer, in a turn that fetches nothing and then sleeps for ten seconds."""
    with connect(server, **SLOW) as connection:
        never_look(connection)
        publish(connection, "a", "b")
        loop = loop_on(connection)
        loop.turn_until(lambda: len(loop.got) == 2 and connection.default_channel._idle)
        sleep_long(loop)

        acked, sent = threading.Event(), threading.Event()

        def acknowledge() -> None:
            settle(loop.got)
            acked.set()

        def watch() -> None:
            deadline = time.monotonic() + 20
            if acked.wait(20):
                deadline = time.monotonic() + 5
            while time.monotonic() < deadline and not sent.wait(0.02):
                if client.hlen("llmtasks.unacked") == 0:
                    sent.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        loop.hub.call_later(0.3, acknowledge)
        loop.turn_until(acked.is_set)  # to the end of the turn
        watcher.join()
        assert sent.is_set()


def sleep_long(loop: Loop) -> None:
    """Take away the timers that wake the loop earlier."""
    loop.hub.timer.clear()
    loop.hub.call_later(10, lambda: None)


@pytest.mark.usefixtures("no_upkeep")
def test_acknowledgements_of_other_threads_wake_the_loop(
    server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop]
) -> None:
    """However long it would sleep; none gets lost between threads."""
    with connect(server, **SLOW) as connection:
        never_look(connection)
        publish_batch(connection, *range(300))
        loop = loop_on(connection)
        loop.turn_until(lambda: len(loop.got) == 300 and connection.default_channel._idle)
        sleep_long(loop)

        with ThreadPoolExecutor(9) as threads:
            threads.submit(time.sleep, 0.3).add_done_callback(
                lambda _: [threads.submit(message.ack) for message in loop.got]
            )
            # Looked at from outside: the turn that sends the last ones goes to sleep after that.
            settled = threads.submit(wait_until, lambda: client.hlen("llmtasks.unacked") == 0, 6, "all is acknowledged")
            settled.add_done_callback(lambda _: loop.hub.call_soon(lambda: None))
            loop.turn_until(settled.done)
            settled.result()


@pytest.mark.usefixtures("no_upkeep")
def test_acknowledgements_after_the_loop_ended_are_sent_at_once(
    server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop]
) -> None:
    """What gathered is sent when the loop is closed, the rest one by one; what is closed with the channel goes too."""
    with connect(server, **SLOW) as connection:
        publish(connection, "a", "b", "c")
        loop = loop_on(connection)
        loop.turn_until(lambda: len(loop.got) == 3)
        a, b, c = loop.got
        a.ack()
        assert client.hlen("llmtasks.unacked") == 3  # gathers
        loop.hub.close()
        assert client.hlen("llmtasks.unacked") == 2
        b.ack()
        assert client.hlen("llmtasks.unacked") == 1
        c.ack()
    with connect(server, **SLOW) as connection:
        publish(connection, "d")
        loop = loop_on(connection)
        loop.turn_until(lambda: len(loop.got) == 1)
        loop.got[0].ack()
        assert client.hlen("llmtasks.unacked") == 1
    assert client.hlen("llmtasks.unacked") == client.llen("q") == 0


@pytest.mark.parametrize("how", ["killed", "cut"])
def test_gathered_acknowledgements_outlive_their_connection(
    tmp_path: Path, loop_on: Callable[..., Loop], how: str
) -> None:
    """They are sent when the server is back, though the channel was closed meanwhile; no message comes again."""
    options: dict[str, Any] = {"visibility_timeout": 2}
    with valkey(tmp_path / "own", unix=True) as own, connect(own, **options) as connection:
        publish_batch(connection, *range(50))
        loop = loop_on(connection)
        loop.turn_until(lambda: len(loop.got) == 50)
        client = redis.Redis(unix_socket_path=own.socket)
        if how == "killed":
            own.kill()
        settle(loop.got[:49])
        if how == "killed":
            with pytest.raises(connection.connection_errors):
                loop.turn_until(lambda: False)
            connection.default_channel.qos.keep({loop.got[49].delivery_tag})  # as a worker that still runs it
            connection.default_channel.qos.restore_at_shutdown = False
            connection.close()
            own.start()
            loop.got[49].ack()
        else:
            client.client_kill_filter(_type="normal", skipme=True)
            loop.got[49].ack()
            with suppress(*connection.connection_errors):
                loop.hub.run_once()
        wait_until(lambda: client.hlen("llmtasks.unacked") == 0, 20, "all is acknowledged")
        assert client.llen("q") == 0
        client.close()


@pytest.mark.parametrize("end", ["cancel", "raise", "close"])
def test_rest_of_a_batch_goes_back_when_nobody_wants_it(
    server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop], end: str
) -> None:
    """In its order: a callback cancelled the consumer, raised an error, or closed the channel."""
    with connect(server) as connection:
        got: list[int] = []

        def take(message: Any) -> None:
            got.append(message.decode())
            message.ack()
            if got[-1] == 10:
                if end == "cancel":
                    loop.consumer.cancel()
                elif end == "close":
                    connection.default_channel.close()
                else:
                    raise LookupError("refused")

        loop = loop_on(connection, take=take)
        publish_batch(connection, *range(100))
        if end == "raise":
            with pytest.raises(LookupError):
                loop.turn_until(lambda: False)
        else:
            loop.turn_until(lambda: got[-1:] == [10])
        assert got == [*range(11)]
        assert client.llen("q") == 89
    assert client.hlen("llmtasks.unacked") == 0
    with connect(server) as connection:
        rest = receive(connection, 89)
        settle(rest)
    assert bodies(rest) == [*range(11, 100)]
    assert {message.delivery_info["delivery_count"] for message in rest} == {1}


def test_fetch_under_way_brings_no_more_than_a_lowered_prefetch(
    server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop]
) -> None:
    """What is too much goes back to the front, in order."""
    with connect(server) as connection:
        loop = loop_on(connection, prefetch=500)
        loop.warm_up()
        publish_batch(connection, *range(20))
        loop.ask(client, 20)
        loop.consumer.qos(prefetch_count=3)
        loop.turn_until(lambda: loop.got)
        assert (len(loop.got), client.llen("q"), client.hlen("llmtasks.unacked")) == (3, 17, 3)
        for number in range(20):
            loop.turn_until(lambda number=number: len(loop.got) > number)
            loop.got[number].ack()

    assert bodies(loop.got) == [*range(20)]


def test_messages_of_a_fetch_that_was_read_too_late_are_not_delivered_twice(
    server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop]
) -> None:
    """Others took some of them meanwhile: whoever sleeps before it reads gets only the rest."""
    with connect(server, visibility_timeout=2) as connection, connect(server) as other:
        loop = loop_on(connection)
        loop.warm_up()
        publish_batch(connection, *range(10))
        loop.ask(client, 10)
        tags = sorted(client.hkeys("llmtasks.unacked"))
        for tag in tags[:4]:  # as whoever finds them without a stamp
            other.default_channel.qos.restore_by_tag(tag.decode())
        taken = receive(other, 4)
        until = time.monotonic() + 1.1
        wait_until(lambda: time.monotonic() > until)

        loop.turn_until(lambda: len(loop.got) == 6)
        assert sorted(bodies(taken) + bodies(loop.got)) == [*range(10)]
        settle(taken)
        settle(loop.got)
        assert client.llen("q") == 0


def test_what_is_fetched_is_stamped_before_it_is_delivered(
    server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop]
) -> None:
    """A callback may take longer than the visibility: those behind it are still its worker's."""
    with connect(server, visibility_timeout=1) as connection, connect(server, visibility_timeout=1) as other:
        other.default_channel.qos.look_after()
        loop = loop_on(connection)
        loop.warm_up()
        publish_batch(connection, *range(10))
        loop.ask(client, 10)
        until: list[float] = []

        def dawdle(message: Any) -> None:
            if not until:
                until.append(time.monotonic() + 4)
                wait_until(lambda: time.monotonic() > until[0] or client.hlen("llmtasks.unacked") < 10)
            loop.got.append(message)

        loop.consumer.on_message = dawdle
        loop.turn_until(lambda: len(loop.got) == 10)
        assert client.hlen("llmtasks.unacked") == 10
        assert client.llen("q") == 0
        settle(loop.got)


def test_slow_callbacks_get_one_message_at_a_time(
    server: Valkey, client: redis.Redis, loop_on: Callable[..., Loop]
) -> None:
    """As in the solo pool, where the callback runs the task: remote control has its turn between two of them."""
    with connect(server) as connection:
        publish_batch(connection, *range(8))
        turns_of: list[int] = []
        turn = 0

        def take(message: Any) -> None:
            time.sleep(0.05)
            turns_of.append(turn)
            message.ack()

        loop = loop_on(connection, take=take)
        while len(turns_of) < 8:
            turn += 1
            loop.hub.run_once()

    assert len(set(turns_of)) == 8


def test_blocking_loop_delivers_one_message_a_call_and_acknowledges_at_once(
    server: Valkey, client: redis.Redis
) -> None:
    """As ``drain_events`` promises, with a prefetch and without; so two who share a queue share its messages."""
    with connect(server) as one, connect(server) as two:
        publish_batch(one, *range(6))
        first, second = one.SimpleQueue("q"), two.SimpleQueue("q")
        for prefetch in (0, 10):
            for queue in (first, second):
                queue.consumer.qos(prefetch_count=prefetch)
        got = [queue.get(timeout=20) for queue in (first, second, first)]
        assert bodies(got) == [0, 1, 2]
        assert client.llen("q") == 3
        for left, message in zip((2, 1, 0), got, strict=True):
            message.ack()
            assert client.hlen("llmtasks.unacked") == left
        first.close()
        second.close()


def test_delivery_count(server: Valkey, client: redis.Redis, holder: ChildProcess) -> None:
    """1 for the first delivery; one more after a holder's death or a return to the queue, none after an orderly end."""

    def counts(messages: list[Any]) -> list[int]:
        return [message.delivery_info["delivery_count"] for message in messages]

    with connect(server, visibility_timeout=1) as connection:
        publish(connection, "a", "b")
        holder.wait_for_log("holds b")
        holder.kill()
        got = receive(connection, 2)
        assert counts(got) == [2, 2]
        got[0].requeue()
        got[1].requeue()
        got = receive(connection, 2)
        assert counts(got) == [3, 3]
    with connect(server) as connection:  # the one before gave them back
        publish(connection, "c")
        with connect(server, "stock") as old:
            publish(old, "d")
        got = receive(connection, 4)
        assert counts(got) == [3, 3, 1, 1]
        settle(got)
        publish(connection, "e")
        message = Queue("q")(connection.default_channel).get()
        assert counts([message]) == [1]
        message.ack()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{port}/2", "redis://:@localhost:{port}/2"])
def test_explicit_url_needs_no_setting(server: Valkey, url: str) -> None:
    """``llmtasks+redis://`` is ours in any app, with ten priorities; shown as written, without its password."""
    with (
        Connection("llmtasks+" + url.format(port=server.port)) as connection,
        redis.Redis(port=server.port, db=2) as client,
    ):
        assert type(connection.default_channel) is Channel
        assert connection.as_uri().startswith("llmtasks+redis://")
        publish(connection, "x", priority=4)
        assert client.llen("q\x06\x164") == 1
        with connection.clone() as clone:
            got = receive(clone, 1)
            assert type(clone.default_channel) is Channel
            settle(got)
    shown = Connection("llmtasks+redis://user:secret@host:1/2").as_uri()
    assert "secret" not in shown


def test_explicit_url_of_a_socket(tmp_path: Path) -> None:
    """``llmtasks+redis+socket://`` too, with its database."""
    with valkey(tmp_path / "own", unix=True) as own, Connection(f"llmtasks+{own.database(5)}") as connection:
        publish(connection, "x")
        with connection.clone() as clone:
            settle(receive(clone, 1))
            assert type(clone.default_channel) is Channel
            assert clone.default_channel.client.connection_pool.connection_kwargs["db"] == 5


def test_who_did_not_choose_it_gets_stock(server: Valkey) -> None:
    """An app that only shares the process with llmtasks, or that turns acknowledgements off."""
    for options in ({}, {"redis_transport": "stock"}, {"redis_transport": "llmtasks", "ack_emulation": False}):
        with Connection(server.url, transport_options=options) as connection:
            assert type(connection.default_channel) is stock.Channel
            assert connection.transport.brpop_timeout == stock.Transport.brpop_timeout


@pytest.mark.parametrize("seconds", [0, -1, "12", None])
def test_impossible_visibility_is_refused(server: Valkey, seconds: object) -> None:
    """By name, before anything is consumed."""
    with (
        pytest.raises(InvalidOptionError, match="visibility_timeout"),
        connect(server, visibility_timeout=seconds) as c,
    ):
        c.connect()


def test_setting_chooses_the_transport(project: Project) -> None:
    """``LLMTASKS_REDIS_TRANSPORT`` decides for every process; the URL stays as people write it."""
    code = """
    import celery
    app = celery.current_app
    with app.connection() as connection:
        print(type(connection.default_channel).__module__, app.conf.broker_url)
    """
    assert project.python(code) == f"llmtasks.broker.redis {project.broker.url}\n"
    project.environ["LLMTASKS_REDIS_TRANSPORT"] = "stock"
    assert project.python(code) == f"kombu.transport.redis {project.broker.url}\n"
    project.environ["LLMTASKS_REDIS_TRANSPORT"] = "fast"
    with pytest.raises(AssertionError, match="expected 'llmtasks' or 'stock'"):
        project.python(code)


def test_importing_llmtasks_late_is_early_enough(project: Project) -> None:
    """kombu remembers the transports that it looked up before: that of ``redis://`` is looked up again."""
    code = """
    import kombu
    print(kombu.Connection("redis://").get_transport_cls().__module__)
    import celery
    with celery.current_app.connection() as connection:
        print(type(connection.default_channel).__module__)
    """
    assert project.python(code).split() == ["kombu.transport.redis", "llmtasks.broker.redis"]


def test_sentinel_is_left_to_stock_and_that_is_said_once(project: Project) -> None:
    """With what that costs."""
    project.environ["LLMTASKS_BROKER_URL"] = "sentinel://127.0.0.1:1"
    with (project.folder / "celeryconfig.py").open("a") as file:
        file.write('broker_transport_options["master_name"] = "mymaster"\n')
    said = "left to stock kombu"
    worker = project.celery("worker", "-l", "INFO", "-n", "w@test", "-c", "1", ready=said, name="sentinel")

    worker.wait_for_log("cannot connect to sentinel://")
    assert worker.log().count(said) == 1
    assert "comes back after 43200 s" in worker.log()


def test_remote_control_works_over_it(project: Project) -> None:
    """A worker with it answers ``celery inspect`` of an app with it, and of one with stock kombu."""
    worker = project.worker(concurrency=1)
    code = "import celery; print([*celery.current_app.control.inspect(timeout=20, limit=1).ping()])"

    assert project.python(code) == f"['{worker.name}@test']\n"
    project.environ["LLMTASKS_REDIS_TRANSPORT"] = "stock"
    assert project.python(code) == f"['{worker.name}@test']\n"


@pytest.mark.parametrize("batched", [False, True])
def test_queue_that_expires_does_so_from_its_first_message_on(
    batched: bool, server: Valkey, client: redis.Redis
) -> None:
    """Its time to live is set once it is there."""
    with connect(server) as connection, connection.Producer() as producer:
        name = f"passing {batched}"
        queue = Queue(name, expires=500)
        with producer.batch() if batched else nullcontext():
            producer.publish("a", routing_key=name, declare=[queue])
        assert 490 < client.ttl(name) <= 500
