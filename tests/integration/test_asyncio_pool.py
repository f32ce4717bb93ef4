"""The asyncio pool: what Celery promises of its own pools holds for a thousand coroutines in one process."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from billiard.exceptions import TimeLimitExceeded

from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, project_with
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import asyncio
    import contextvars
    import gc
    import os
    import random
    import threading

    import celery
    from billiard.exceptions import SoftTimeLimitExceeded

    from llmtasks import task_registry
    from tests.notebook import gate, gate_sync, note

    mark = contextvars.ContextVar("mark", default=None)
    running = 0


    @task_registry.register(name="add", max_retries=0)
    async def add(x, y):
        return x + y


    @task_registry.register(name="sees", bind=True, max_retries=0)
    async def sees(self, key):
        # How often it saw something that is not its own.
        wrong = 0

        def look():
            return (self.request.id, celery.current_task.request.id, mark.get()) != (me, me, key)

        async def child():
            await asyncio.sleep(random.random() * 0.05)
            return look()

        me = self.request.id
        wrong += mark.get() is not None
        mark.set(key)
        for _ in range(10):
            await asyncio.sleep(random.random() * 0.1)
            wrong += look()
        wrong += sum(await asyncio.gather(child(), asyncio.create_task(child()), asyncio.to_thread(look)))
        return [key, wrong]


    @task_registry.register(name="sees_in_thread", bind=True, max_retries=0)
    def sees_in_thread(self, key):
        before = mark.get()
        mark.set(key)
        return [before, self.request.id == celery.current_task.request.id, threading.current_thread().name]


    @task_registry.register(name="passes", max_retries=2, retry_delay=0)
    async def passes(name):
        note(name, "began")
        try:
            await gate(name)
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)
            note(name, "tidied up")
            raise
        note(name, "ended")
        return "done"


    @task_registry.register(name="at_once", max_retries=0)
    async def at_once(name):
        # The most that ran at the same time, as this run saw it.
        global running
        running += 1
        note(name, running)
        await gate(name)
        running -= 1


    @task_registry.register(name="at_a_rate", rate_limit="4/s", max_retries=0)
    async def at_a_rate():
        return asyncio.get_running_loop().time()


    @task_registry.register(name="stubborn", max_retries=0)
    async def stubborn(name):
        while True:
            try:
                await asyncio.sleep(60)
            except (asyncio.CancelledError, SoftTimeLimitExceeded) as error:
                note(name, type(error).__name__)
                if isinstance(error, asyncio.CancelledError) and not isinstance(error, SoftTimeLimitExceeded):
                    break


    @task_registry.register(name="waits", max_retries=0)
    async def waits(how):
        result = await add.adelay(1, 2)
        if how == "get":
            return result.get(timeout=10)
        late = await passes.adelay("never opened")
        try:
            await late.aget(timeout=0.2)
        except celery.exceptions.TimeoutError:
            return [await result.aget(timeout=30), "late"]


    @task_registry.register(name="waits_for_failure", max_retries=0)
    async def waits_for_failure():
        try:
            await (await add.adelay(1, "x")).aget(timeout=30)
        except TypeError as error:
            return str(error)


    @task_registry.register(name="objects", max_retries=0)
    def objects():
        gc.collect()
        return len(gc.get_objects())


    @task_registry.register(name="leaves", max_retries=0)
    async def leaves():
        raise SystemExit(3)
"""

pytestmark = pytest.mark.redis


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    with project_with(tmp_path, TASKS, **QUICK, LLMTASKS_POOL="asyncio") as project:
        yield project


@pytest.fixture
def worker(project: Project) -> CeleryProcess:
    return project.worker(concurrency=1000)


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_thousand_interleaved_runs_see_only_their_own(tasks: Any) -> None:
    """Request, current_task and context are each run's own, after awaits, in its children and in its threads."""
    results = tasks["sees"].map_delay(range(1000))

    found = [result.get(timeout=120) for result in results]

    assert found == [[key, 0] for key in range(1000)]


@pytest.mark.usefixtures("worker")
def test_sync_functions_run_in_threads_beside_the_loop(tasks: Any) -> None:
    """Each has its own request and a fresh context, whoever used the thread before."""
    results = tasks["sees_in_thread"].map_delay(range(100))

    found = [result.get(timeout=60) for result in results]

    assert {(before, right) for before, right, _ in found} == {(None, True)}
    assert all(name.startswith("llmtasks-sync") for _, _, name in found)


def test_terminate_cancels_the_coroutine(worker: CeleryProcess, project: Project, tasks: Any, ledger: Ledger) -> None:
    """Celery's revoke with terminate: CancelledError inside, the finally block runs, REVOKED outside; nothing stays."""
    result = tasks["passes"].delay("terminated")
    ledger.notes("terminated", 1)

    project.app.control.revoke(result.id, terminate=True)

    assert ledger.ends(result.id).state is RunState.CANCELLED
    assert ledger.notes("terminated", 2) == ["began", "tidied up"]
    wait_until(lambda: result.state == "REVOKED", 60, "the result says so")
    wait_until(lambda: _active(project) == [], 60, "nothing is active")
    assert tasks["add"].delay(1, 2).get(timeout=60) == 3
    assert worker.running


@pytest.mark.usefixtures("worker")
def test_inspect_shows_what_runs(project: Project, tasks: Any, ledger: Ledger) -> None:
    """`celery inspect active` and `stats` know the runs, the pool and its places."""
    result = tasks["passes"].delay("shown")
    ledger.notes("shown", 1)

    active, stats = _active(project), _stats(project)

    assert [entry["id"] for entry in active] == [result.id]
    assert active[0]["time_start"] is not None
    assert stats["pool"]["implementation"] == "llmtasks.worker.pool:AsyncioPool"
    assert (stats["pool"]["max-concurrency"], stats["pool"]["running"]) == (1000, 1)
    ledger.open_gate("shown")
    assert result.get(timeout=60) == "done"


def test_pool_grows_and_shrinks(project: Project, tasks: Any, ledger: Ledger) -> None:
    """`pool_grow` lets waiting runs start, `pool_shrink` takes places away and never the last one."""
    project.worker(concurrency=1)
    results = [tasks["at_once"].delay("grown") for _ in range(3)]
    ledger.notes("grown", 1)

    project.app.control.pool_grow(1)
    ledger.notes("grown", 2)
    wait_until(lambda: _stats(project)["pool"]["max-concurrency"] == 2, 30, "two places")
    project.app.control.pool_shrink(1)
    wait_until(lambda: _stats(project)["pool"]["max-concurrency"] == 1, 30, "one place")
    project.app.control.pool_shrink(1)

    assert ledger.notes_now("grown") == ["1", "2"]
    ledger.open_gate("grown")
    for result in results:
        result.get(timeout=60)
    assert _stats(project)["pool"]["max-concurrency"] == 1


def test_autoscale_follows_the_load(project: Project, tasks: Any, ledger: Ledger) -> None:
    """`--autoscale` lets more run at once while there is more to run."""
    project.worker("--autoscale=3,1")
    results = [tasks["at_once"].delay("scaled") for _ in range(3)]

    ledger.notes("scaled", 3)

    ledger.open_gate("scaled")
    for result in results:
        result.get(timeout=60)


@pytest.mark.usefixtures("worker")
def test_rate_limit_is_kept(tasks: Any) -> None:
    """Celery's rate_limit spaces the starts."""
    results = [tasks["at_a_rate"].delay() for _ in range(6)]

    starts = sorted(result.get(timeout=60) for result in results)

    assert starts[-1] - starts[0] >= 5 / 4 * 0.8


@pytest.mark.usefixtures("worker")
def test_hard_limit_ends_a_run_that_swallows_the_soft_one(tasks: Any, ledger: Ledger) -> None:
    """The message's own limits count: told first, then ended, and the worker goes on."""
    result = tasks["stubborn"].apply_async(["stubborn"], soft_time_limit=0.3, time_limit=0.8)

    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=60)
    assert ledger.ends(result.id).state is RunState.FAILED
    assert ledger.notes("stubborn", 2) == ["TimeIsUp", "CancelledError"]
    assert tasks["add"].delay(1, 2).get(timeout=60) == 3


@pytest.mark.usefixtures("worker")
def test_exit_inside_a_coroutine_fails_the_run_alone(tasks: Any, ledger: Ledger) -> None:
    """sys.exit() in one coroutine is that run's failure, not the end of a thousand others."""
    result = tasks["leaves"].delay()

    run = ledger.ends(result.id)
    assert run.state is RunState.FAILED
    assert "SystemExit" in (run.error or "")
    assert tasks["add"].delay(1, 2).get(timeout=60) == 3


@pytest.mark.usefixtures("worker")
def test_coroutine_waits_for_a_result_without_stopping_the_loop(tasks: Any) -> None:
    """`await result.aget()` gives the value, the run's error, or TimeoutError; `get` is refused and says so."""
    assert tasks["waits"].delay("aget").get(timeout=60) == [3, "late"]
    assert "unsupported operand" in tasks["waits_for_failure"].delay().get(timeout=60)
    with pytest.raises(RuntimeError, match=r"await result\.aget"):
        tasks["waits"].delay("get").get(timeout=60)


def test_warm_shutdown_waits_for_what_runs(project: Project, tasks: Any, ledger: Ledger) -> None:
    """SIGTERM with fifty running: all succeed, are acknowledged, and nothing is left in the broker."""
    worker = project.worker(concurrency=100)
    results = [tasks["passes"].delay("warm") for _ in range(50)]
    ledger.notes("warm", 50)

    os.kill(worker.pid, signal.SIGTERM)
    worker.wait_for_log("Warm shutdown")
    ledger.open_gate("warm")

    assert worker.process.wait(60) == 0
    assert {ledger.ends(result.id).state for result in results} == {RunState.SUCCEEDED}
    assert ledger.notes_now("warm").count("ended") == 50
    assert _unacknowledged(project) == 0


def test_cold_shutdown_puts_runs_back_uncounted(project: Project, tasks: Any, ledger: Ledger) -> None:
    """SIGQUIT: coroutines are cancelled, another worker runs them, and no attempt is spent."""
    worker = project.worker(concurrency=100)
    results = [tasks["passes"].delay("cold") for _ in range(5)]
    ledger.notes("cold", 5)

    os.kill(worker.pid, signal.SIGQUIT)
    worker.process.wait(60)
    ledger.open_gate("cold")
    project.worker(concurrency=100)

    for result in results:
        run = ledger.ends(result.id)
        assert (run.state, run.attempts) == (RunState.SUCCEEDED, 1)


@pytest.mark.slow
@pytest.mark.fault
def test_worker_killed_under_two_hundred_runs_loses_none(project: Project, tasks: Any, ledger: Ledger) -> None:
    """SIGKILL, another worker: each run ends, completed once, without a new message in between."""
    worker = project.worker(concurrency=1000)
    results = tasks["passes"].map_delay(["killed"] * 200)
    ledger.notes("killed", 200)

    worker.kill()
    ledger.open_gate("killed")
    project.worker(concurrency=1000)

    for result in results:
        assert ledger.ends(result.id).state is RunState.SUCCEEDED
    assert ledger.notes_now("killed").count("ended") == 200


@pytest.mark.slow
def test_beat_inside_the_worker(project: Project, ledger: Ledger) -> None:
    """`worker -B` forks beat beside the loop's thread: schedules fire and coroutines run."""
    project.tasks(
        """
        from llmtasks import task_registry
        from tests.notebook import note


        @task_registry.register(name="ticks", interval_minutes=1 / 60)
        async def ticks():
            note("ticks")
        """,
        "scheduled",
    )
    worker = project.worker("-B", concurrency=10)

    ledger.notes("ticks", 3)

    assert worker.terminate() == 0


@pytest.mark.slow
def test_ten_thousand_runs_leave_nothing_behind(project: Project, tasks: Any, worker: CeleryProcess) -> None:
    """After thousands of runs, failed and cancelled ones among them, the worker has no more objects than before."""
    process = psutil.Process(worker.pid)

    def burst(count: int) -> None:
        sums = tasks["add"].map_delay([(number, 1) for number in range(count)])
        fails = tasks["add"].map_delay([(number, "x") for number in range(count // 20)])
        doomed = tasks["passes"].map_delay(["never"] * (count // 50))
        wait_until(lambda: _stats(project)["pool"]["running"] == len(doomed), 60, "only those that wait are running")
        project.app.control.revoke([result.id for result in doomed], terminate=True)
        for result in [*sums[-20:], *fails, *doomed]:
            wait_until(result.ready, 60, "it ended")
        wait_until(lambda: _stats(project)["pool"]["running"] == 0, 30, "nothing runs")

    for _ in range(3):
        burst(1000)
    objects, memory = tasks["objects"].delay().get(timeout=60), process.memory_info().rss
    for _ in range(7):
        burst(1000)

    assert tasks["objects"].delay().get(timeout=60) < objects + 2000
    # The C library keeps what many failures at once took; what leaked 8 KB a run would be 56 MB.
    assert process.memory_info().rss - memory < 40 * 2**20


def _stats(project: Project) -> dict[str, Any]:
    (found,) = project.app.control.inspect(timeout=10, limit=1).stats().values()
    return dict(found)


def _active(project: Project) -> list[dict[str, Any]]:
    (found,) = project.app.control.inspect(timeout=10, limit=1).active().values()
    return list(found)


def _unacknowledged(project: Project) -> int:
    import redis

    with redis.Redis(unix_socket_path=project.broker.socket) as client:
        return int(client.zcard("llmtasks.unacked_index")) + int(client.zcard("unacked_index"))
