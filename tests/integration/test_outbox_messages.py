"""What the outbox sends: the same messages and events whether one is written by Celery and kombu or printed."""

import base64
import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import redis
from celery import signals

from llmtasks import sender
from llmtasks.message import DELIVER, RUN, Message
from tests.ledger import project_with, queue_length
from tests.listening import listening
from tests.processes import Project
from tests.waiting import wait_until

pytestmark = pytest.mark.redis

TASKS = """
    from llmtasks import task_registry


    @task_registry.register(name="add")
    def add(x, y=0):
        return x + y


    @task_registry.register(name="urgent", priority=1, queue="fast", timeout=60)
    def urgent(x, y=0):
        return x
"""


@pytest.fixture
def project(tmp_path: Any) -> Iterator[Project]:
    with project_with(tmp_path, TASKS) as project:
        yield project


@pytest.fixture
def client(project: Project) -> Iterator[Any]:
    with redis.Redis(unix_socket_path=project.broker.socket, decode_responses=True) as client:
        yield client


def message(name: str, args: Any, kwargs: Any, **fields: Any) -> Message:
    options = {"soft_time_limit": 60, "time_limit": 70, **fields.pop("options", {})}
    row: dict[str, Any] = {
        "run_id": str(uuid.uuid4()), "kind": RUN, "app": "here", "func_name": name, "args": json.dumps(args),
        "kwargs": json.dumps(kwargs), "envelope": sender.envelope_of_options(options), "queue": None, "priority": 5,
        "attempts": 0, "replacement": None, "schedule_id": "s", "reserved_until": datetime.now(UTC),
    }  # fmt: skip
    return Message(**{**row, **fields})


def watched(project: Project, messages: list[Message]) -> None:
    """Send while somebody receives a signal of each message: nothing is printed then."""
    seen: list[Any] = []

    def receive(**told: Any) -> None:
        seen.append(told)

    signals.after_task_publish.connect(receive)
    try:
        assert sender.publish(project.app, messages) == {}
    finally:
        signals.after_task_publish.disconnect(receive)
    assert len(seen) == len(messages)


def sent(client: Any, key: str) -> list[dict[str, Any]]:
    """The messages at a key, oldest first, with their bodies as Celery's tuple and without their own tags."""
    found: list[dict[str, Any]] = []
    for text in reversed(client.lrange(key, 0, -1)):
        item = json.loads(text)
        item["body"] = json.loads(base64.b64decode(item["body"]))
        uuid.UUID(item["properties"].pop("delivery_tag"))
        found.append(item)
    client.delete(key)
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"priority": 1},
        {"queue": "other"},
        {"attempts": 2},
        {"kind": DELIVER},
        {"options": {"root_id": "root", "parent_id": "parent", "shadow": "shown", "link": [{"task": "see"}]}},
        {"options": {"headers": {"tenant": "blue"}, "ignore_result": True}},
        {"options": {"stamped_headers": ["tenant"], "tenant": "blue"}},
        {"options": {"expires": "2030-01-01T00:00:00+00:00"}},
    ],
)
@pytest.mark.parametrize("name", ["add", "urgent", "unknown"])
def test_message_is_the_one_that_celery_would_have_sent(
    name: str, fields: dict[str, Any], project: Project, client: Any
) -> None:
    """Of all kinds of messages, with all kinds of arguments, the first and those after it."""
    arguments: list[tuple[list[Any], dict[str, Any]]] = [
        ([], {}),
        ([1], {"y": None}),
        (['it\'s "100 %" of %(id)s \\ \n é'], {"y": {"deep": [True, 1.5]}}),
        (["long" * 500], {}),
    ]
    messages = [message(name, args, kwargs, **fields) for args, kwargs in arguments]

    watched(project, messages)
    keys = [key for key in client.keys("*") if client.type(key) == "list"]
    expected = {key: sent(client, key) for key in keys}
    for _ in range(3):
        assert sender.publish(project.app, messages) == {}
        assert {key: sent(client, key) for key in keys} == expected
    assert sum(map(len, expected.values())) == len(messages)


def test_sent_events_are_those_of_celery(project: Project) -> None:
    """Each of its own run, with a time and a clock of its own."""
    messages = [message("add", [number], {}) for number in range(9)]
    with listening(project) as heard:
        watched(project, messages)
        sender.publish(project.app, messages)
        wait_until(lambda: len(heard.now()) >= 18, 30, "18 events")
        events = heard.now()

    assert {event["type"] for event in events} == {"task-sent"}
    assert [event["uuid"] for event in events] == [one.run_id for one in messages] * 2
    assert len({event["clock"] for event in events}) == 18
    passing = {"timestamp", "clock", "local_received"}
    by_celery, printed = (
        [{name: value for name, value in event.items() if name not in passing} for event in some]
        for some in (events[:9], events[9:])
    )
    assert printed == by_celery


def test_what_the_app_changes_holds_for_the_next_messages(project: Project) -> None:
    """Its routes, its default queue, and what its functions say."""
    app = project.app
    many = [message("add", [1], {}) for _ in range(7)]
    routes = {"add": {"queue": "by-name"}}

    sender.publish(app, many)
    app.conf.task_default_queue = "elsewhere"
    sender.publish(app, many)
    app.conf.update(task_routes=routes)
    sender.publish(app, many)
    routes["add"]["queue"] = "by-another-name"
    sender.publish(app, many)
    app.conf.update(task_routes=[lambda name, args, *_, **__: {"queue": f"number-{args[0]}"}])
    sender.publish(app, many)

    for queue in ("celery", "elsewhere", "by-name", "by-another-name", "number-1"):
        assert queue_length(project.broker, queue) == 7


def test_arguments_of_the_wrong_kind_are_told(project: Project) -> None:
    """Those of one message, also where others like it were sent; the others are."""
    good = [message("add", [1], {}) for _ in range(9)]
    bad = [message("add", [1], [1]), message("add", {"x": 1}, {})]

    refused = sender.publish(project.app, [*good, *bad, *good])

    assert {run_id: type(error) for run_id, error in refused.items()} == {one.run_id: TypeError for one in bad}
    assert queue_length(project.broker) == 18
