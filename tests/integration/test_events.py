"""Events of tasks leave the worker in groups: none is missing, also where the broker or the worker goes away."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from tests.ledger import Ledger, on_pools
from tests.processes import Project
from tests.waiting import wait_until

TASKS = """
    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="quick")
    async def quick(number):
        return number


    @task_registry.register(name="waits")
    async def waits(name):
        note(name)
        await gate(name)
"""

pool, project = on_pools(TASKS, "asyncio", "prefork", "threads")

pytestmark = pytest.mark.redis


class Heard:
    """The events that arrive while a receiver listens."""

    def __init__(self, events: Any) -> None:
        self._events = events
        self.all: list[dict[str, Any]] = []

    def of(self, run_id: str) -> list[str]:
        """The kinds of a run's events in the order in which they came."""
        with suppress(TimeoutError):
            self._events.drain_events(timeout=0.1)
        return [event["type"] for event in self.all if event.get("uuid") == run_id]


@contextmanager
def listening(project: Project) -> Iterator[Heard]:
    app = project.app
    with app.connection_for_read() as connection:
        receiver: Any = app.events.Receiver(connection, handlers={"*": lambda event: heard.all.append(dict(event))})
        with receiver.consumer_context() as (events, *_):
            heard = Heard(events)
            heard.of("nobody")  # subscribes
            yield heard


TOLD = ["task-received", "task-started", "task-succeeded"]


def test_every_run_is_told_of(project: Project) -> None:
    """Six hundred at once, more than one message takes: each with its three events in their order."""
    with listening(project) as heard:
        worker = project.worker(concurrency=20)
        results = project.app.tasks["quick"].map_delay([(number,) for number in range(600)])
        wait_until(lambda: heard.of(results[-1].id)[-1:] == TOLD[-1:], 60, "the last run to be told of")
        for result in results:
            wait_until(lambda id=result.id: [kind for kind in heard.of(id) if kind != "task-sent"] == TOLD, 30, "all")
        worker.terminate()


def test_last_events_are_sent_before_the_worker_ends(project: Project) -> None:
    """A run that ends while the worker shuts down is told of too."""
    ledger = Ledger(project)
    with listening(project) as heard:
        worker = project.worker(concurrency=2)
        result = project.app.tasks["waits"].delay("last")
        ledger.notes("last", 1)
        worker.signal(signal.SIGTERM)
        wait_until(lambda: "Warm shutdown" in worker.tail(), 30, "the worker to shut down")
        ledger.open_gate("last")
        wait_until(lambda: not worker.running, 60, "the worker to end")

        wait_until(lambda: heard.of(result.id)[-1:] == TOLD[-1:], 10, "its end to be told of")
