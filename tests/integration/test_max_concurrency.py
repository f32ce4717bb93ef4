"""max_concurrency: so many runs of a function at once in one worker; the others wait in it and are in nobody's way."""

import signal
import time
from typing import Any

import pytest

from llmtasks import Task
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, on_pools, queue_length
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import asyncio
    import time

    from llmtasks import task_registry
    from tests.notebook import gate, gate_sync, is_open, note


    @task_registry.register(name="limited", max_concurrency=2, max_retries=0)
    async def limited(name, number):
        note(name, f"began {number}")
        await gate(name)
        note(name, f"ended {number}")
        await asyncio.sleep(0)


    @task_registry.register(name="limited_sync", max_retries=0, config={"max_concurrency": 2})
    def limited_sync(name, number):
        note(name, f"began {number}")
        gate_sync(name)
        note(name, f"ended {number}")


    @task_registry.register(name="limited_off", max_concurrency=2, max_retries=0, ledger="off")
    async def limited_off(name, number):
        note(name, f"began {number}")
        await gate(name)
        note(name, f"ended {number}")


    @task_registry.register(name="slow_rate", max_concurrency=1, max_retries=0, rate_limit="2/s")
    async def slow_rate(name, number):
        note(name, f"{time.time()}")


    @task_registry.register(name="free", max_retries=0)
    async def free(x):
        return x
"""

pytestmark = pytest.mark.redis


pool, project = on_pools(TASKS, "asyncio", "prefork", **QUICK)


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    return project.worker(concurrency=4)


def stats_of(project: Project, name: str, worker: str = "worker-1@test") -> dict[str, int]:
    """What ``inspect stats`` says of a limited function."""
    answer = project.app.control.inspect([worker], timeout=5).stats()
    return dict((answer or {}).get(worker, {}).get("max_concurrency", {}).get(name) or {})


def most_at_once(notes: list[str]) -> int:
    """How many runs had begun and not ended, at most."""
    running, most = 0, 0
    for note in notes:
        running += 1 if note.startswith("began") else -1
        most = max(most, running)
    return most


@pytest.mark.parametrize("name", ["limited", "limited_sync", "limited_off"])
def test_so_many_run_at_once_and_the_others_wait_in_order(
    name: str, project: Project, tasks: Any, ledger: Ledger
) -> None:
    """Two run, ten wait, and a function without a limit runs meanwhile; then they begin in the order of arrival."""
    results = [tasks[name].delay(name, number) for number in range(12)]
    wait_until(lambda: stats_of(project, name) == {"limit": 2, "running": 2, "waiting": 10}, 60, "ten wait")

    assert [tasks["free"].delay(number).get(timeout=30) for number in range(8)] == [*range(8)]
    assert len(ledger.notes(name, 2)) == 2
    if name != "limited_off":  # those that wait are not claimed
        known = [ledger.run(result.id) for result in results]
        assert [run.state for run in known if run is not None] == [RunState.RUNNING] * 2

    ledger.open_gate(name)
    notes = ledger.notes(name, 24)
    for result in results:
        result.get(timeout=60)
    assert most_at_once(notes) == 2
    began = [int(note.split()[1]) for note in notes if note.startswith("began")]
    # Two begin side by side: whichever writes its note first.
    assert all(abs(number - place) <= 3 for place, number in enumerate(began)), began
    wait_until(lambda: stats_of(project, name) == {"limit": 2, "running": 0, "waiting": 0}, 60, "none is left")


def test_revoked_or_cancelled_while_it_waits_never_starts(project: Project, tasks: Any, ledger: Ledger) -> None:
    """Celery's revoke and Task.cancel_run reach a run that waits in a worker."""
    results = [tasks["limited"].delay("stopped", number) for number in range(6)]
    wait_until(lambda: stats_of(project, "limited").get("waiting") == 4, 60, "four wait")

    results[2].revoke()
    Task.cancel_run_sync(results[3].id)
    ledger.open_gate("stopped")

    for number in (0, 1, 4, 5):
        results[number].get(timeout=60)
    assert sorted({int(note.split()[1]) for note in ledger.notes_now("stopped")}) == [0, 1, 4, 5]
    assert ledger.ends(results[2].id).state is RunState.CANCELLED
    assert ledger.ends(results[3].id).state is RunState.CANCELLED
    wait_until(lambda: stats_of(project, "limited")["running"] == 0, 60, "their places are free")


def test_rate_limit_goes_on_beside_it(tasks: Any, ledger: Ledger) -> None:
    """What Celery's rate_limit lets through passes the gate then."""
    for number in range(4):
        tasks["slow_rate"].delay("rated", number)

    times = [float(note) for note in ledger.notes("rated", 4)]
    assert times[-1] - times[0] > 1.2  # three times half a second, begun early by the bucket's first token


@pytest.mark.parametrize("pool", ["asyncio"], indirect=True)
def test_thousand_that_wait_let_others_pass(project: Project, tasks: Any, ledger: Ledger) -> None:
    """A function behind 1,300 messages of a limited one runs soon, and in the end all have run."""
    tasks["limited"].map_delay([("many", number) for number in range(1_300)])
    results = [tasks["free"].delay(number) for number in range(5)]

    assert [result.get(timeout=60) for result in results] == [*range(5)]
    assert len(ledger.notes_now("many")) <= 2
    assert stats_of(project, "limited")["waiting"] <= 1_000

    began = time.monotonic()
    ledger.open_gate("many")
    notes = ledger.notes("many", 2_600, timeout=120)
    print(f"1,300 runs in {time.monotonic() - began:.1f} s")
    assert most_at_once(notes) == 2
    assert {int(note.split()[1]) for note in notes} == {*range(1_300)}


def test_shutdown_gives_back_what_waits(project: Project, tasks: Any, ledger: Ledger) -> None:
    """A worker that ends while others of the function run gives those that wait to the broker at once."""
    second = project.worker("-Q", "second", concurrency=4)
    for number in range(10):
        tasks["limited"].apply_async(("leaving", number), queue="second")
    wait_until(lambda: stats_of(project, "limited", f"{second.name}@test").get("waiting") == 8, 60, "eight wait")

    second.signal(signal.SIGTERM)

    wait_until(lambda: queue_length(project.broker, "second") == 8, 30, "they are with the broker")
    assert second.running
    ledger.open_gate("leaving")
    assert second.terminate() == 0
    assert len(ledger.notes_now("leaving")) == 4
    second.start()
    assert len(ledger.notes("leaving", 20)) == 20
    second.terminate()


@pytest.mark.parametrize("pool", ["asyncio"], indirect=True)
def test_killed_worker_loses_nothing_that_waited(project: Project, tasks: Any, ledger: Ledger) -> None:
    """kill -9 while runs wait: the next worker has them all."""
    third = project.worker("-Q", "third", concurrency=4)
    for number in range(10):
        tasks["limited"].apply_async(("killed", number), queue="third")
    wait_until(lambda: stats_of(project, "limited", third.name + "@test").get("waiting") == 8, 60, "eight wait")

    third.kill()
    ledger.open_gate("killed")
    third.start()

    wait_until(
        lambda: len({note for note in ledger.notes_now("killed") if note.startswith("ended")}) >= 8, 60, "eight ended"
    )
    third.terminate()
