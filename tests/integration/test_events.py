"""Events of tasks leave the worker in groups: none is missing, also where the broker or the worker goes away."""

import signal

import pytest

from tests.ledger import Ledger, on_pools
from tests.listening import listening
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


TOLD = ["task-received", "task-started", "task-succeeded"]


def test_every_run_is_told_of(project: Project) -> None:
    """Six hundred at once, more than one message takes: each with its three events in their order."""
    with listening(project) as heard:
        worker = project.worker(concurrency=20)
        results = project.app.tasks["quick"].map_delay([(number,) for number in range(600)])

        def told() -> bool:
            kinds: dict[str, list[str]] = {result.id: [] for result in results}
            for event in heard.now():
                if event.get("uuid") in kinds and event["type"] != "task-sent":
                    kinds[event["uuid"]].append(event["type"])
            return all(of_one == TOLD for of_one in kinds.values())

        wait_until(told, 90, "every run to be told of")
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
