"""SIGKILL at each step of an attempt: every run ends with the right result, and no function is called without need."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from celery import chain, chord

from llmtasks.states import RunState
from tests import mines
from tests.ledger import Ledger
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    from celery import current_app

    import tests.mines
    from llmtasks import task_registry
    from tests.notebook import note

    current_app.conf.broker_connection_timeout = 1  # how long a dead sender of a chord's body is waited for


    @task_registry.register(name="step", max_retries=3, retry_delay=0)
    async def step(value, name):
        await body(name)
        return value + 1


    async def body(name):
        note(name)


    @task_registry.register(name="total", max_retries=3, retry_delay=0)
    def total(numbers, name):
        note(name, numbers)
        return sum(numbers)
"""
Start = Callable[..., CeleryProcess]

pytestmark = [pytest.mark.redis, pytest.mark.fault, pytest.mark.slow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A place in the way of an attempt, and how often its function is called when the process dies there."""

    event: str
    file: str
    function: str
    calls: int = 1


#: In the order of an attempt. Those of the main process kill the whole worker either way.
STEPS = {
    "claim begins": Step(event="call", file="llmtasks/attempt/claiming.py", function="claim_run"),
    "claimed": Step(event="return", file="llmtasks/attempt/claiming.py", function="claim_run"),
    "call begins": Step(event="call", file="llmtasks/attempt/calling.py", function="call"),
    "function ended": Step(event="return", file="tasks.py", function="body", calls=2),
    "called": Step(event="return", file="llmtasks/attempt/calling.py", function="call", calls=2),
    "finish begins": Step(event="call", file="llmtasks/attempt/finishing.py", function="finish", calls=2),
    "end is about to be written": Step(event="call", file="llmtasks/store/ends.py", function="end_lone", calls=2),
    "end is written": Step(event="return", file="llmtasks/store/ends.py", function="end_lone"),
    "finished": Step(event="return", file="llmtasks/attempt/finishing.py", function="finish"),
    "links are sent": Step(event="call", file="celery/backends/base.py", function="mark_as_done"),
    "result is stored": Step(event="return", file="celery/backends/base.py", function="store_result"),
    "sends the chord's body": Step(
        event="call", file="celery/backends/redis.py", function="_chord_publish_claim_expires"
    ),
    "chord's body is sent": Step(event="call", file="celery/backends/redis.py", function="_chord_cleanup_script"),
    "chord is told": Step(event="return", file="celery/backends/base.py", function="mark_as_done"),
    "after return": Step(event="call", file="llmtasks/attempt/telling.py", function="after_return"),
    "tracer has ended": Step(event="return", file="celery/app/trace.py", function="trace_task"),
    # By the heart, whatever the tracer does meanwhile.
    "delivered is written": Step(event="return", file="llmtasks/store/held.py", function="mark_delivered", calls=2),
    "acknowledgement begins": Step(event="call", file="kombu/message.py", function="ack"),
    "acknowledged": Step(event="return", file="kombu/message.py", function="ack"),
}


#: Where the asyncio pool does something of its own: these are tried with it too.
ON_THE_LOOP = (
    "claimed", "function ended", "end is about to be written", "finished", "links are sent", "chord is told",
    "delivered is written",
)  # fmt: skip
KILLS = [
    *((step, "prefork", kills) for step in STEPS for kills in ("process", "worker")),
    *((step, "asyncio", "worker") for step in ON_THE_LOOP),
]


@pytest.mark.parametrize(("step", "pool", "kills"), KILLS)
def test_chain_and_chord_survive_a_kill_at(
    step: str, pool: str, kills: str, project: Project, start_worker: Start, ledger: Ledger
) -> None:
    """Both give the right result, every run succeeds, and no function is called twice but for one killed mid-call."""
    place, name = STEPS[step], f"{step}, {pool}, {kills}"
    tasks: Any = project.app.tasks
    worker = start_worker(concurrency=1, pool=pool)  # nobody else is hit
    mines.lay(project.folder, event=place.event, file=place.file, function=place.function, kills=kills)

    first, *others = (f"{name}: link {number}" for number in range(3))
    last = chain(tasks["step"].s(0, first), *(tasks["step"].s(link) for link in others)).apply_async()
    members = [tasks["step"].s(number, f"{name}: member {number}") for number in range(3)]
    summed = chord(members)(tasks["total"].s(f"{name}: total"))
    wait_until(lambda: mines.exploded(project.folder), 30, "somebody steps on the mine")
    if kills == "worker" or place.file == "kombu/message.py":
        wait_until(lambda: not worker.running, 30, "the worker to be dead")
        start_worker(concurrency=1, pool=pool)

    assert last.get(timeout=60) == 3
    assert summed.get(timeout=60) == 6
    runs = [run for run in ledger.all() if name in str(run.args)]
    assert {ledger.ends(run.id).state for run in runs} == {RunState.SUCCEEDED}
    assert len(runs) == 7
    parts = [*(f"link {number}" for number in range(3)), *(f"member {number}" for number in range(3)), "total"]
    called = {part: len(ledger.notes_now(f"{name}: {part}")) for part in parts}
    assert set(called.values()) <= {1, place.calls}
    assert sum(called.values()) <= 7 + (place.calls - 1)
