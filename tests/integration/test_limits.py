"""Time limits: the function is told first and may tidy up; who does not listen is ended, which is a failed attempt."""

from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from llmtasks import Task
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, on_pools
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import asyncio
    import os
    import time

    from billiard.exceptions import SoftTimeLimitExceeded

    from llmtasks import task_registry
    from tests.notebook import note, notes


    @task_registry.register(name="awaits", timeout=0.5, max_retries=0)
    async def awaits(name):
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            await asyncio.sleep(0)
            note(name, "tidied up")
            raise


    @task_registry.register(name="awaits_in_children", timeout=0.5, max_retries=0)
    async def awaits_in_children():
        async def child(number):
            try:
                await asyncio.sleep(60)
            finally:
                note("children", number)

        async with asyncio.TaskGroup() as group:
            group.create_task(child(1))
            group.create_task(child(2))


    @task_registry.register(name="awaits_for", timeout=0.5, max_retries=0)
    async def awaits_for():
        async def inner():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                note("inner", "cancelled")
                raise

        await asyncio.wait_for(inner(), 50)


    @task_registry.register(name="gives_in", timeout=0.5, max_retries=0)
    async def gives_in():
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            return "what I have so far"


    @task_registry.register(name="blocks", timeout=0.5, max_retries=0)
    async def blocks(name):
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded:
            note(name, "tidied up")
            raise


    @task_registry.register(name="works", timeout=0.5, max_retries=0)
    def works(name):
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded:
            note(name, "tidied up")
            raise


    @task_registry.register(name="slow_at_first", timeout=0.7, max_retries=1, retry_delay=0)
    async def slow_at_first(name, seconds=60):
        note(name)
        if len(notes(name)) == 1:
            await asyncio.sleep(seconds)
        return "quick now"


    @task_registry.register(name="deaf", soft_time_limit=0.3, time_limit=1, max_retries=1, retry_delay=0,
                            on_failure=lambda run, error: note("deaf told", f"{run.attempts} {type(error).__name__}"))
    def deaf(name):
        note(name, os.getpid())
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                time.sleep(60)
            except SoftTimeLimitExceeded:
                pass


    @task_registry.register(name="deaf_coroutine", soft_time_limit=0.3, time_limit=1, max_retries=0)
    async def deaf_coroutine(name):
        note(name, os.getpid())
        while True:
            try:
                await asyncio.sleep(60)
            except (SoftTimeLimitExceeded, asyncio.CancelledError):
                pass


    @task_registry.register(name="patient", timeout=60, max_retries=0)
    async def patient():
        await asyncio.sleep(60)


    @task_registry.register(name="hello", max_retries=0)
    async def hello():
        await asyncio.sleep(0)
        return "hello"
"""

pytestmark = pytest.mark.redis


pool, project = on_pools(TASKS, "asyncio", "prefork", **QUICK)


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    return project.worker()


#: What computes, or blocks its loop, can be interrupted by a signal only.
ON_PREFORK = pytest.mark.parametrize("pool", ["prefork"], indirect=True)


@pytest.mark.parametrize(
    ("pool", "name"),
    [("asyncio", "awaits"), ("prefork", "awaits"), ("prefork", "blocks"), ("prefork", "works")],
    indirect=["pool"],
)
def test_function_is_told_that_its_time_is_up(name: str, tasks: Any, ledger: Ledger) -> None:
    """SoftTimeLimitExceeded is raised inside the function, which may catch it, however it spends its time."""
    result = tasks[name].delay(name)

    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=60)
    assert ledger.notes_now(name) == ["tidied up"]
    run = ledger.ends(result.id)
    assert (run.state, run.attempts) == (RunState.FAILED, 1)
    assert "SoftTimeLimitExceeded" in str(run.error)
    assert run.run_seconds is not None
    assert 0.4 < run.run_seconds < 20


def test_children_of_a_coroutine_are_cancelled_with_it(tasks: Any, ledger: Ledger) -> None:
    """A task group ends its tasks when the limit ends the function."""
    result = tasks["awaits_in_children"].delay()

    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=60)
    assert sorted(ledger.notes_now("children")) == ["1", "2"]


def test_wait_for_ends_what_it_waits_for(tasks: Any, ledger: Ledger) -> None:
    """A limit that meets a coroutine inside wait_for cancels the inner one too."""
    result = tasks["awaits_for"].delay()

    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=60)
    assert ledger.notes_now("inner") == ["cancelled"]


def test_function_may_answer_when_its_time_is_up(tasks: Any, ledger: Ledger) -> None:
    """What a coroutine returns after catching the limit is its result."""
    result = tasks["gives_in"].delay()

    assert result.get(timeout=60) == "what I have so far"
    assert ledger.ends(result.id).state is RunState.SUCCEEDED


def test_timeout_counts_as_a_failed_attempt(tasks: Any, ledger: Ledger) -> None:
    """A run that was too slow once is tried again."""
    result = tasks["slow_at_first"].delay("slow at first")

    assert result.get(timeout=60) == "quick now"
    assert ledger.ends(result.id).attempts == 2


def test_limit_leaves_the_loop_of_its_process_in_order(tasks: Any) -> None:
    """After limits and cancellations the children's loops serve other runs."""
    wait_until(lambda: [tasks["hello"].delay().get(timeout=60) for _ in range(4)] == ["hello"] * 4, 60)


@ON_PREFORK
def test_function_that_does_not_listen_is_ended_by_force(tasks: Any, ledger: Ledger) -> None:
    """The hard limit ends the process; the attempt counts, the next one follows, and the last one's error is told."""
    result = tasks["deaf"].delay("deaf")

    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=60)
    run = ledger.ends(result.id)
    assert (run.state, run.attempts, run.losses) == (RunState.FAILED, 2, 2)
    first, second = ledger.notes_now("deaf")
    assert first != second
    assert ledger.notes_now("deaf told") == ["2 TimeLimitExceeded"]


def test_coroutine_that_swallows_its_limit_is_ended_by_force(tasks: Any, ledger: Ledger) -> None:
    """A coroutine that catches everything is ended with its process."""
    result = tasks["deaf_coroutine"].delay("deaf coroutine")

    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=60)
    assert ledger.ends(result.id).attempts == 1


def test_limits_of_one_message_win(tasks: Any, ledger: Ledger) -> None:
    """apply_async(soft_time_limit=) is in force for that run."""
    result = tasks["slow_at_first"].apply_async(("patient", 1.5), soft_time_limit=30, time_limit=60)

    assert result.get(timeout=60) == "quick now"
    assert ledger.ends(result.id).attempts == 1


def test_task_with_a_timeout_of_its_own_overrides_the_function(tasks: Any, ledger: Ledger) -> None:
    """A Task's timeout counts, not its function's."""
    task = Task(func_name="patient", interval_minutes=60, timeout=0.4).save_sync()

    run = task.execute_now_sync()

    assert "SoftTimeLimitExceeded(0.4" in str(ledger.ends(run.id).error)
