"""``llmtasks pause`` and ``resume`` of functions and queues, as an operator types them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from tests.commandline import app_with, command, document

TASKS = """
from llmtasks import task_registry


@task_registry.register(name="index")
async def index():
    pass


@task_registry.register(name="off", ledger="off")
async def off():
    pass
"""


@pytest.fixture(autouse=True)
def app(tmp_path: Path) -> Iterator[Celery]:
    with app_with(tmp_path, TASKS) as app:
        yield app


def test_function_is_paused_listed_and_resumed() -> None:
    """With who, when and why; a second resume says that there was nothing to resume."""
    said = command("pause", "--function", "index", "--by", "ops", "--reason", "the provider is down")
    assert said.exit_code == 0, said.output
    assert said.output.startswith("function 'index' is paused by ops since ")
    assert said.output.endswith(": the provider is down\n")

    assert command("pause", "--list").output == said.output
    (paused,) = document("pause", "--list")
    assert paused["paused_at"].endswith("+00:00")
    assert {name: paused[name] for name in ("kind", "name", "paused_by", "reason")} == {
        "kind": "function",
        "name": "index",
        "paused_by": "ops",
        "reason": "the provider is down",
    }

    assert command("resume", "--function", "index").output == "function 'index' goes on\n"
    assert document("resume", "--function", "index") == {"kind": "function", "name": "index", "was_paused": False}
    assert command("pause", "--list").output == "no function and no queue is paused\n"


def test_queue_is_paused_and_resumed() -> None:
    """The user of the shell is who wants it where nobody is named."""
    paused = document("pause", "--queue", "mail")
    assert (paused["kind"], paused["name"], paused["reason"]) == ("queue", "mail", None)
    assert paused["paused_by"]

    assert command("resume", "--queue", "mail").output == "queue 'mail' goes on\n"
    assert command("resume", "--queue", "mail").output == "queue 'mail' was not paused\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pause",), "expected one of ID|NAME of a Task, --function NAME and --queue NAME"),
        (("pause", "--function", "index", "--queue", "mail"), "expected one of"),
        (("resume", "task", "--queue", "mail"), "expected one of"),
        (("pause", "task", "--reason", "why"), "--reason is for --function and --queue"),
        (("pause", "--function", "indx"), "index"),
        (("pause", "--function", "off"), "pause its queue"),
    ],
    ids=str,
)
def test_mistake_is_named(arguments: tuple[str, ...], message: str) -> None:
    """Nothing is paused by halves."""
    done = command(*arguments)

    assert done.exit_code != 0
    assert message in done.output
