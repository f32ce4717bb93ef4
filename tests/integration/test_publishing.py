"""Sending: what a message carries, what one and many cost, what a caller learns who sends bad ones or to nobody."""

import asyncio
import base64
import gc
import itertools
import json
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import kombu.pools
import pytest
import redis
from celery import Celery, signals
from celery._state import _task_stack

from llmtasks import aside
from llmtasks.errors import BrokerUnavailableError, DuplicateRunError, InvalidOptionError, InvalidParamsError
from llmtasks.states import RunState
from tests.ledger import Ledger, project_with, queue_length
from tests.listening import listening
from tests.processes import Project
from tests.waiting import wait_until

pytestmark = pytest.mark.redis

TASKS = """
    from llmtasks import task_registry


    @task_registry.register(name="add", max_retries=0)
    def add(x, y=0):
        return x + y


    @task_registry.register(name="urgent", priority=1, queue="fast", timeout=60, max_retries=0)
    def urgent(text="", *, number=0):
        return text


    @task_registry.register(name="once", unique=["x"], on_duplicate="refuse")
    def once(x):
        return x
"""

#: Says what a message carries that is different each time.
PASSING = frozenset({"id", "root_id", "correlation_id", "delivery_tag", "llm_sent_at"})


@pytest.fixture
def project(tmp_path: Any) -> Iterator[Project]:
    """A project without a worker, whose broker the test may kill."""
    with project_with(tmp_path, TASKS) as project:
        yield project


@pytest.fixture
def client(project: Project) -> Iterator[Any]:
    with redis.Redis(unix_socket_path=project.broker.socket, decode_responses=True) as client:
        yield client


def watched(run: Callable[[], Any]) -> Any:
    """Do something while somebody receives a signal of each message: Celery sends these one by one."""

    def receive(**_: Any) -> None:
        """Nothing."""

    signals.after_task_publish.connect(receive)
    try:
        return run()
    finally:
        signals.after_task_publish.disconnect(receive)


def messages(client: Any, key: str) -> list[dict[str, Any]]:
    """The messages at a key, oldest first, without what differs each time; their bodies as Celery's tuple."""
    found: list[dict[str, Any]] = []
    for text in reversed(client.lrange(key, 0, -1)):
        message = json.loads(text)
        message["body"] = json.loads(base64.b64decode(message["body"]))
        for part in (message["headers"], message["properties"]):
            for name in PASSING & set(part):
                part[name] = type(part[name]).__name__
        found.append(message)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"priority": 2, "text": "it's \\ \n" + "long" * 500},
        {"text": "100 % of %(id)s"},
        {"queue": "other", "headers": {"tenant": "blue"}},
        {"time_limit": 9, "soft_time_limit": 7, "ignore_result": True, "shadow": "shown", "retry": False},
        {"compression": "zlib"},
    ],
)
@pytest.mark.parametrize("name", ["add", "urgent"])
def test_message_is_the_one_that_celery_would_have_sent(
    name: str, options: dict[str, Any], project: Project, tasks: Any, client: Any
) -> None:
    """Header for header: of one run, of many, and of those that Celery's own code sends one by one."""
    options = dict(options)
    if options.get("compression"):  # a compressed body is no JSON
        tasks[name].apply_async(("a",), **options)
        assert queue_length(project.broker, "fast" if name == "urgent" else "celery") == 1
        return

    text = options.pop("text", "a")
    for _ in range(7):  # what could be found out before was found out before
        tasks[name].apply_async((text,), **options)
    tasks[name].map_delay([text, (text,)], **options)
    tasks[name].map_delay([text] * 6, **options)
    watched(lambda: tasks[name].apply_async((text,), **options))
    watched(lambda: tasks[name].map_delay([text], **options))

    (key,) = [key for key in client.keys("*") if client.type(key) == "list"]
    found = messages(client, key)
    assert len(found) == 17
    assert found == [found[-1]] * 17


def test_message_of_a_running_task_names_its_parent(project: Project, tasks: Any, client: Any) -> None:
    """Each of its own, whatever was sent before."""
    tasks["add"].map_delay([0] * 9)
    for number in range(2):
        tasks["add"].push_request(id=f"parent {number}", root_id=f"root {number}", called_directly=False)
        _task_stack.push(tasks["add"])
        try:
            tasks["add"].delay(1)
            tasks["add"].map_delay([2])
        finally:
            _task_stack.pop()
            tasks["add"].pop_request()
    tasks["add"].delay(0)

    sent = [json.loads(text)["headers"] for text in reversed(client.lrange("celery\x06\x164", 0, -1))][8:]
    assert [(item["root_id"] == item["id"], item["parent_id"]) for item in (sent[0], sent[-1])] == [(True, None)] * 2
    assert [(item["root_id"], item["parent_id"]) for item in sent[1:-1]] == [
        ("root 0", "parent 0"), ("root 0", "parent 0"), ("root 1", "parent 1"), ("root 1", "parent 1")
    ]  # fmt: skip


def test_what_the_app_changes_holds_for_the_next_message(project: Project, tasks: Any, client: Any) -> None:
    """What was found out for the messages before is found out again."""
    add, app = tasks["add"], project.app
    routes = {"add": {"queue": "by-name"}}

    def send() -> None:
        for _ in range(7):
            add.delay(1)

    send()
    add.ignore_result = True
    send()
    app.conf.task_default_queue = "elsewhere"
    send()
    app.conf.update(task_routes=routes)
    send()
    routes["add"]["queue"] = "by-another-name"
    send()

    sent = [json.loads(text)["headers"] for text in reversed(client.lrange("celery\x06\x164", 0, -1))]
    assert [item["ignore_result"] for item in sent] == [False] * 7 + [True] * 7
    for queue in ("elsewhere", "by-name", "by-another-name"):
        assert queue_length(project.broker, queue) == 7


def test_routes_of_the_app_decide_where_messages_go(project: Project, tasks: Any) -> None:
    """By name, by a pattern, or by a router of the app's own that looks at each item's arguments."""
    tasks["add"].delay(1)
    project.app.conf.task_routes = {"add": {"queue": "by-name"}}
    project.app.amqp.flush_routes()
    project.app.amqp.__dict__.pop("router", None)
    tasks["add"].delay(1)
    tasks["add"].map_delay([1, 2])
    assert queue_length(project.broker, "by-name") == 3

    def by_argument(name: str, args: Any, *_: Any, **__: Any) -> Any:
        return {"queue": f"number-{args[0]}"}

    project.app.conf.task_routes = [by_argument]
    project.app.amqp.flush_routes()
    project.app.amqp.__dict__.pop("router", None)
    tasks["add"].map_delay([1, 2, 2])
    tasks["add"].delay(1)
    assert (queue_length(project.broker, "number-1"), queue_length(project.broker, "number-2")) == (2, 2)


def test_publish_signals_and_what_is_wrapped_around_celery_see_each_message(
    tasks: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver may change the headers of each message, of many too; tracing libraries wrap ``send_task``."""
    seen: list[str] = []

    def before(sender: str, headers: dict[str, Any], **_: Any) -> None:
        headers["trace"] = f"{sender}-{len(seen)}"
        seen.append("before")

    def after(**_: Any) -> None:
        seen.append("after")

    signals.before_task_publish.connect(before)
    signals.after_task_publish.connect(after)
    try:
        tasks["add"].delay(1)
        tasks["add"].map_delay([2, 3])
    finally:
        signals.before_task_publish.disconnect(before)
        signals.after_task_publish.disconnect(after)
    assert seen == ["before", "after"] * 3
    assert [item["headers"]["trace"] for item in messages(client, "celery\x06\x164")] == ["add-0", "add-2", "add-4"]

    original, wrapped = Celery.send_task, list[str]()

    def send_task(self: Any, name: str, *args: Any, **options: Any) -> Any:
        wrapped.append(name)
        return original(self, name, *args, **options)

    monkeypatch.setattr(Celery, "send_task", send_task)
    tasks["add"].delay(1)
    tasks["add"].map_delay([2, 3])
    assert wrapped == ["add"] * 3


def test_what_is_wrapped_around_kombu_sees_each_message(
    project: Project, tasks: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And may change its headers; from the moment in which it is there to that in which it is not."""
    original, seen = kombu.Producer._publish, list[str]()

    def _publish(self: Any, body: Any, priority: Any, kind: Any, encoding: Any, headers: Any, *rest: Any) -> Any:
        seen.append("")
        headers = {**headers, "trace": f"number {len(seen)}"}
        return original(self, body, priority, kind, encoding, headers, *rest)

    def send() -> None:
        tasks["add"].map_delay(range(3))
        tasks["add"].delay(3)

    project.app.conf.task_send_sent_event = False
    for _ in range(3):
        send()
    with monkeypatch.context() as patch:
        patch.setattr(kombu.Producer, "_publish", _publish)
        send()
    send()

    found = [item["headers"].get("trace") for item in messages(client, "celery\x06\x164")]
    assert found == [*[None] * 12, *(f"number {number}" for number in (1, 2, 3, 4)), *[None] * 4]


def test_client_that_repeats_commands_sends_messages_one_by_one(tmp_path: Any) -> None:
    """With ``retry_on_timeout`` redis-py sends again what may have arrived: one message at most, as kombu has it."""
    with project_with(tmp_path, TASKS) as project:
        project.app.conf.broker_transport_options["retry_on_timeout"] = True
        task: Any = project.app.tasks["add"]
        with redis.Redis(unix_socket_path=project.broker.socket, decode_responses=True) as client:
            task.map_delay(range(20))
            before = commands(client)
            task.map_delay(range(20))
            assert commands(client)["eval"] - before["eval"] == 20


def test_sent_events_are_those_of_celery(project: Project, tasks: Any) -> None:
    """One and many tell ``task-sent`` with Celery's fields, if the app wants such events."""
    with listening(project) as heard:
        project.app.conf.task_send_sent_event = False
        tasks["add"].delay(1)
        project.app.conf.task_send_sent_event = True
        watched(lambda: tasks["add"].delay(1, y=2))
        tasks["add"].delay(1, y=2)
        results = tasks["add"].map_delay([{"x": 1, "y": 2}, (1,)])
        wait_until(lambda: len(heard.now()) >= 4, 30, "four events")
        events = heard.now()

    assert {event["type"] for event in events} == {"task-sent"}
    assert [event["uuid"] for event in events[2:]] == [result.id for result in results]
    passing = {"uuid", "root_id", "timestamp", "clock", "local_received", "args", "kwargs"}
    plain = [{name: value for name, value in event.items() if name not in passing} for event in events]
    assert plain == [plain[0]] * 4
    assert [(event["args"], event["kwargs"]) for event in events] == [
        ("(1,)", "{'y': 2}"), ("(1,)", "{'y': 2}"), ("()", "{'x': 1, 'y': 2}"), ("(1,)", "{}")
    ]  # fmt: skip


@pytest.mark.parametrize("transport", ["llmtasks", "stock"])
def test_many_take_one_round_trip_for_each_500(transport: str, tmp_path: Any) -> None:
    """1,200 messages with their events are three round trips, in order; on our transport three commands too."""
    with project_with(tmp_path, TASKS, LLMTASKS_REDIS_TRANSPORT=transport) as project:
        task: Any = project.app.tasks["add"]
        task.map_delay([0])  # connects and declares
        with redis.Redis(unix_socket_path=project.broker.socket, decode_responses=True) as client:
            client.delete("celery\x06\x164")
            before = commands(client)
            pipelines = reads(client)

            results = task.map_delay(range(1200))

            used, read = commands(client), reads(client) - pipelines
            assert [item["body"][0] for item in messages(client, "celery\x06\x164")] == [[n] for n in range(1200)]
        assert len({result.id for result in results}) == 1200
        assert used.get("eval", 0) - before.get("eval", 0) == (3 if transport == "llmtasks" else 0)
        assert used["lpush"] - before.get("lpush", 0) == (3 if transport == "llmtasks" else 1200)
        assert used.get("subscribe", 0) == before.get("subscribe", 0)
        assert read < 600  # one reading of the socket takes 16 KiB; one by one there would be 2,400


def commands(client: Any) -> dict[str, int]:
    """How often the server did each command."""
    return {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in client.info("commandstats").items()}


def reads(client: Any) -> int:
    """How often the server read from its clients."""
    return int(client.info("stats")["total_reads_processed"])


def test_items_are_taken_when_their_turn_comes(project: Project, tasks: Any) -> None:
    """A generator is not read to its end first; what it raises comes through, and what went before is sent."""

    def items() -> Iterator[int]:
        yield from range(499)
        assert queue_length(project.broker) == 0
        yield 499
        assert queue_length(project.broker) == 500
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        tasks["add"].map_delay(items())
    assert queue_length(project.broker) == 500
    assert tasks["add"].map_delay([]) == []


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(
    ("bad", "said"), [((1, 2, 3), "item 700: arguments of 'add' do not fit"), (object(), r"item 700: args\[0\] is")]
)
def test_bad_item_is_named_and_leaves_out_its_500(
    bad: Any, said: str, seen: bool, project: Project, tasks: Any
) -> None:
    """The first 500 are sent, of the next 500 none, and the error has the handles of those that are."""
    items = [*range(700), bad, *range(700)]

    def send() -> Any:
        return tasks["add"].map_delay(items, ignore_result=True)  # Celery's own sending subscribes to each

    with pytest.raises(InvalidParamsError, match=said) as caught:
        watched(send) if seen else send()

    assert len({result.id for result in caught.value.sent}) == 500
    assert queue_length(project.broker) == 500


@pytest.mark.parametrize("seen", [False, True])
def test_broker_that_goes_away_between_batches_is_told_with_what_was_sent(
    seen: bool, project: Project, tasks: Any
) -> None:
    """The error says how many items the broker has and of how many that is not known."""

    def items() -> Iterator[int]:
        yield from range(1000)
        project.broker.kill()
        yield from range(300)

    def send() -> Any:
        return tasks["add"].map_delay(items(), ignore_result=True)  # Celery's own sending subscribes to each

    said = "the first 1000 items were sent, the next 300 perhaps, the others not"
    with pytest.raises(BrokerUnavailableError, match=said) as caught:
        watched(send) if seen else send()
    assert len(caught.value.sent) == 1000

    project.broker.start()
    assert queue_length(project.broker) == 1000
    tasks["add"].map_delay(range(3))
    assert queue_length(project.broker) == 1003


def test_connection_that_broke_meanwhile_is_no_error(project: Project, tasks: Any) -> None:
    """A broker that was restarted between two sendings costs nothing but a new connection."""
    tasks["add"].delay(1)
    project.broker.restart()
    tasks["add"].delay(2)
    project.broker.restart()
    tasks["add"].map_delay([3, 4])

    assert queue_length(project.broker) == 4


def test_runs_that_the_database_keeps_are_kept_one_by_one(project: Project, tasks: Any, ledger: Ledger) -> None:
    """Runs of a unique function and those of another time are rows before they are messages; a duplicate is named."""
    later = tasks["add"].map_delay([1, 2], countdown=60)
    assert {ledger.run(result.id).state for result in later} == {RunState.PENDING}  # type: ignore[union-attr]
    assert queue_length(project.broker) == 0

    with pytest.raises(DuplicateRunError) as caught:
        tasks["once"].map_delay([1, 2, 1, 3])
    assert caught.value.__notes__ == ["This is about item 2."]
    assert [result.id for result in caught.value.sent] == [run.id for run in reversed(ledger.all("once"))]


def test_options_of_one_run_are_not_those_of_many(tasks: Any) -> None:
    """``task_id`` would be that of all; a wrong priority is refused as by apply_async."""
    with pytest.raises(InvalidOptionError, match="task_id='mine': expected only options that all runs share"):
        tasks["add"].map_delay([1], task_id="mine")
    with pytest.raises(InvalidOptionError, match="priority=11"):
        tasks["add"].map_delay([1], priority=11)


async def lag_while(work: Callable[[], Any]) -> tuple[float, float]:
    """By how many seconds the event loop was late at worst while ``work`` was awaited, and of these by our own doing.

    What other processes do makes the loop late too; what threads of this one do takes its own CPU time.
    """
    late, own = [0.0], [0.0]

    async def tick() -> None:
        while True:
            began, used = time.perf_counter(), time.process_time()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - began - 0.001)
            own.append(min(late[-1], time.process_time() - used))

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    await work()
    ticker.cancel()
    return max(late), max(own)


async def least_lag_while(work: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """The best of some rounds."""
    found = [await lag_while(work) for _ in range(rounds)]
    return min(late for late, _ in found), min(own for _, own in found)


async def test_adelay_does_not_hold_up_the_event_loop(project: Project, tasks: Any) -> None:
    """While 200 are sent at a time, or while the broker is away, it holds the loop for less than 30 ms of its time.

    Sent on the loop they would take 80 ms. ``benchmarks publish`` says what they take, on a machine that is not busy.
    """

    async def many() -> None:
        await asyncio.gather(*(tasks["add"].adelay(number) for number in range(200)))

    async def refused() -> None:
        errors = await asyncio.gather(*(tasks["add"].adelay(n) for n in range(200)), return_exceptions=True)
        assert {isinstance(error, BrokerUnavailableError) for error in errors} == {True}

    await many()
    late, own = await least_lag_while(many, 10)
    assert own < 0.030
    assert late < 0.1
    assert queue_length(project.broker) == 2200
    project.broker.kill()
    late, own = await least_lag_while(refused, 4)
    assert own < 0.030
    assert late < 0.1


async def test_thread_that_could_not_be_started_is_started_by_the_next_call(
    tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks while the system has no thread to give hears of it; nobody waits for what will not come."""
    aside._forget_thread()

    def start(_thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await tasks["add"].adelay(1)
    assert (await asyncio.wait_for(tasks["add"].adelay(1), 20)).id


async def test_broker_that_is_away_takes_no_thread_of_anybody_else(project: Project, tasks: Any) -> None:
    """200 adelay without a broker end as soon as a few, and ``asyncio.to_thread`` works meanwhile."""
    await tasks["add"].adelay(1)
    project.broker.kill()

    async def refused(count: int) -> float:
        began = time.monotonic()
        errors = await asyncio.gather(*(tasks["add"].adelay(n) for n in range(count)), return_exceptions=True)
        assert {type(error).__mro__[1] for error in errors} == {BrokerUnavailableError}
        return time.monotonic() - began

    few = await refused(1)
    sending = asyncio.create_task(refused(200))
    began = time.monotonic()
    await asyncio.sleep(0)
    await asyncio.gather(*(asyncio.to_thread(time.monotonic) for _ in range(20)))
    assert time.monotonic() - began < few
    assert not sending.done()
    assert await sending < few * 4 + 1

    project.broker.start()
    assert (await tasks["add"].adelay(1)).id


def test_forked_process_sends_with_threads_of_its_own(project: Project) -> None:
    """Those of its parent do not exist there."""
    shown = project.python(
        """
        import asyncio
        from billiard import get_context
        from celery import current_app
        current_app.loader.import_default_modules()
        from tasks import add

        def send():
            asyncio.run(add.adelay(2))
            print("sent", flush=True)

        asyncio.run(add.adelay(1))
        child = get_context("fork").Process(target=send)
        child.start()
        child.join(30)
        print(child.exitcode)
        """
    )

    assert shown.split() == ["sent", "0"]
    assert queue_length(project.broker) == 2


def test_messages_of_a_batch_keep_their_order(project: Project, tasks: Any, client: Any) -> None:
    """Messages of several queues and priorities in one of kombu's batches: each queue has its own, in order."""
    with project.app.producer_or_acquire() as producer, producer.batch(max_size=10_000):
        for number, queue in itertools.product(range(1500), ("one", "two")):
            producer.publish({"n": number}, routing_key=queue, priority=number % 2)

    for queue in ("one", "two"):
        for priority, key in ((0, queue), (1, f"{queue}\x06\x161")):
            found = [item["body"]["n"] for item in messages(client, key)]
            assert found == list(range(priority, 1500, 2))


def test_closed_channels_are_not_kept(project: Project, tasks: Any) -> None:
    """What was written down for one is forgotten with it."""
    app: Any = project.app
    tasks["add"].delay(1)
    with app.producer_or_acquire() as producer:
        channel = weakref.ref(producer.channel)
    del producer

    kombu.pools.reset()
    app.amqp._producer_pool = app._pool = None
    tasks["add"].delay(2)

    gc.collect()
    assert channel() is None
    assert queue_length(project.broker) == 2
