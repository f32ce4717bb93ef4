"""SIGKILL of workers and of their children: every accepted run ends, and is called no more often than it must be."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError
from celery import chain, chord

from llmtasks.states import RunState
from tests.ledger import Ledger
from tests.processes import CeleryProcess, Project

TASKS = """
    import os
    import signal
    import time

    from llmtasks import task_registry
    from tests.notebook import gate, gate_sync, note, notes


    @task_registry.register(name="passes", max_retries=3, retry_delay=0)
    async def passes(name, *values):
        note(name, os.getpid())
        await gate(name)
        return sum(values) + 1


    @task_registry.register(name="only", unique=True, max_retries=3, retry_delay=0)
    async def only(name):
        note(name, os.getpid())
        await gate(name)
        return name


    @task_registry.register(name="total", max_retries=0)
    def total(numbers):
        note("total", numbers)
        return sum(numbers)


    def tell(run, error):
        note("told", f"{run.id} {run.attempts} {type(error).__name__}")


    @task_registry.register(name="kills_its_process", bind=True, max_retries=2, retry_delay=0, on_failure=tell)
    def kills_its_process(self, name):
        note(name, self.request.retries)
        os.kill(os.getpid(), signal.SIGKILL)


    @task_registry.register(name="kills_its_worker", bind=True, max_retries=1, retry_delay=0, on_failure=tell)
    def kills_its_worker(self, name, is_a_child):
        note(name, self.request.retries)
        os.kill(os.getppid() if is_a_child else os.getpid(), signal.SIGKILL)
        time.sleep(60)


    @task_registry.register(name="exits", max_retries=1, retry_delay=0)
    def exits(name):
        note(name)
        raise SystemExit(3)


    @task_registry.register(name="mark", max_retries=0)
    def mark(name, *_):
        note(name)
"""
Start = Callable[..., CeleryProcess]

pytestmark = [pytest.mark.redis, pytest.mark.fault]


@pytest.fixture
def tasks(project: Project) -> Any:
    return project.app.tasks


def test_run_of_a_killed_worker_is_run_again(start_worker: Start, tasks: Any, ledger: Ledger) -> None:
    """Another worker finishes it; the lost attempt counts and is recorded as lost."""
    victim = start_worker()
    result = tasks["passes"].delay("again", 1)
    ledger.notes("again", 1)
    rescuer = start_worker()

    victim.kill()

    ledger.notes("again", 2)
    ledger.open_gate("again")
    assert result.get(timeout=60) == 2
    run = ledger.ends(result.id)
    assert (run.state, run.attempts, run.losses, run.worker) == (RunState.SUCCEEDED, 2, 1, f"{rescuer.name}@test")


def test_run_of_a_killed_worker_stays_unique(start_worker: Start, tasks: Any, ledger: Ledger) -> None:
    """While nobody runs it, and in the next attempt: whoever asks gets the same run, until that has ended."""
    victim = start_worker()
    result = tasks["only"].delay("lonely")
    ledger.notes("lonely", 1)

    victim.kill()

    assert tasks["only"].delay("lonely").id == result.id
    start_worker()
    ledger.notes("lonely", 2)
    assert tasks["only"].delay("lonely").id == result.id
    ledger.open_gate("lonely")
    assert result.get(timeout=60) == "lonely"
    assert ledger.ends(result.id).losses == 1
    following = tasks["only"].delay("lonely")
    assert following.id != result.id
    assert following.get(timeout=60) == "lonely"


def test_run_of_a_killed_child_is_run_again_at_once(start_worker: Start, tasks: Any, ledger: Ledger) -> None:
    """The main process sees its child die and does not wait for the lease."""
    worker = start_worker(pool="prefork")
    result = tasks["passes"].delay("child", 1)
    [pid] = ledger.notes("child", 1)

    os.kill(int(pid), signal.SIGKILL)

    ledger.notes("child", 2)
    ledger.open_gate("child")
    assert result.get(timeout=60) == 2
    run = ledger.ends(result.id)
    assert (run.attempts, run.losses) == (2, 1)
    assert worker.running


def test_run_that_kills_its_process_each_time_fails(start_worker: Start, tasks: Any, ledger: Ledger) -> None:
    """After max_retries + 1 attempts the result is WorkerLostError, on_failure and the errback hear of it, once."""
    start_worker(pool="prefork")

    result = tasks["kills_its_process"].apply_async(("poison",), link_error=tasks["mark"].si("errback"))

    with pytest.raises(WorkerLostError):
        result.get(timeout=60)
    run = ledger.ends(result.id)
    assert (run.state, run.attempts, run.losses) == (RunState.FAILED, 3, 3)
    assert ledger.notes_now("poison") == ["0", "1", "2"]
    ledger.notes("errback", 1)
    assert [line for line in ledger.notes_now("told") if result.id in line] == [f"{result.id} 3 WorkerLostError"]


@pytest.mark.parametrize("pool", ["asyncio", "prefork"])
def test_run_that_kills_whole_workers_fails(pool: str, start_worker: Start, tasks: Any, ledger: Ledger) -> None:
    """Found out by the lease alone: no process is left to say what happened. The next worker tells the end."""
    name = f"whole {pool}"
    result = tasks["kills_its_worker"].delay(name, pool == "prefork")

    for attempt in (1, 2):
        victim = start_worker(pool=pool)
        ledger.notes(name, attempt)
        victim.process.wait(60)
        victim.close()
    start_worker(pool=pool)

    with pytest.raises(WorkerLostError):
        result.get(timeout=60)
    run = ledger.ends(result.id)
    assert (run.state, run.attempts, run.losses) == (RunState.FAILED, 2, 2)
    assert ledger.notes_now(name) == ["0", "1"]
    assert [line for line in ledger.notes_now("told") if result.id in line] == [f"{result.id} 2 WorkerLostError"]


def test_function_that_exits_is_a_failed_attempt(start_worker: Start, tasks: Any, ledger: Ledger) -> None:
    """SystemExit ends the child, not the worker, and counts like any failure."""
    start_worker()

    result = tasks["exits"].delay("exits")

    with pytest.raises(WorkerLostError):
        result.get(timeout=60)
    assert ledger.ends(result.id).attempts == 2
    assert len(ledger.notes_now("exits")) == 2


def test_chain_survives_a_killed_worker(start_worker: Start, tasks: Any, ledger: Ledger) -> None:
    """Killed while its second link runs: the first is not called again, the third gets the result."""
    victim = start_worker()
    ledger.open_gate("link 1")
    result = chain(*(tasks["passes"].si(f"link {number}") for number in (1, 2, 3))).apply_async()
    ledger.notes("link 2", 1)

    victim.kill()
    start_worker()
    ledger.notes("link 2", 2)
    ledger.open_gate("link 2")
    ledger.open_gate("link 3")

    assert result.get(timeout=60) == 1
    assert [len(ledger.notes_now(f"link {number}")) for number in (1, 2, 3)] == [1, 2, 1]


def test_chord_survives_a_killed_worker(start_worker: Start, tasks: Any, ledger: Ledger) -> None:
    """Killed with members done, running and waiting: its body is called once with all results."""
    victim = start_worker()
    for number in (0, 1):
        ledger.open_gate(f"member {number}")
    members = [tasks["passes"].s(f"member {number}", number) for number in range(5)]
    result = chord(members)(tasks["total"].s())
    ledger.notes("member 2", 1)
    ledger.notes("member 3", 1)

    victim.kill()
    start_worker()
    for number in (2, 3, 4):
        ledger.open_gate(f"member {number}")

    assert result.get(timeout=60) == 15
    ledger.ends(result.id)
    assert ledger.notes_now("total") == ["[1, 2, 3, 4, 5]"]
    assert [len(ledger.notes_now(f"member {number}")) for number in range(5)] == [1, 1, 2, 2, 1]


def test_only_the_main_process_killed(start_worker: Start, tasks: Any, ledger: Ledger) -> None:
    """Its children die with it and do not go on beside the next worker."""
    victim = start_worker()
    result = tasks["passes"].delay("main", 1)
    [pid] = ledger.notes("main", 1)

    victim.kill_main()
    start_worker()

    second = ledger.notes("main", 2)[1]
    ledger.open_gate("main")
    assert result.get(timeout=60) == 2
    assert pid != second
    assert ledger.ends(result.id).attempts == 2
