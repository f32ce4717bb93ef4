"""track_task_performance measures what a call used, keeps the function as it was, and changes nothing it does."""

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, shared_task

from llmtasks import metrics
from llmtasks.errors import ConfigurationError
from llmtasks.metrics import track_task_performance

MIB = 2**20
on_linux = pytest.mark.skipif(not metrics._CLEAR_REFS.exists(), reason="needs Linux's mark of the peak")


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "llmtasks.metrics")
    return caplog


def burn(seconds: float) -> None:
    """Use CPU time of this thread."""
    import time

    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def hold_memory(size: int) -> int:
    """Have so many bytes resident for a moment."""
    return len(bytearray(b"x" * size))


def logged(log: pytest.LogCaptureFixture, name: str) -> Any:
    """The one record that was logged."""
    (record,) = log.records
    return getattr(record, name)


def test_function_outside_a_run_logs_one_line(log: pytest.LogCaptureFixture) -> None:
    """Name, wall time, CPU time and peak memory of the call are in one line, and in the record's fields."""

    @track_task_performance
    def add(x: int, y: int) -> int:
        burn(0.02)
        return x + y

    assert add(1, y=2) == 3
    assert "add took" in log.records[0].getMessage()
    assert logged(log, "wall_seconds") >= logged(log, "cpu_seconds") >= 0.02
    assert logged(log, "peak_memory") > MIB


def test_decorated_function_is_seen_as_the_function_itself() -> None:
    """Name, documentation, signature and being a coroutine function stay."""

    async def fetch(url: str, *, tries: int = 3) -> str:
        """Fetch it."""
        return url * tries

    tracked = track_task_performance(fetch)

    assert tracked.__name__ == "fetch"
    assert tracked.__doc__ == "Fetch it."
    assert inspect.signature(tracked) == inspect.signature(fetch)
    assert inspect.iscoroutinefunction(tracked)


async def test_coroutine_counts_its_own_steps_only(log: pytest.LogCaptureFixture) -> None:
    """What another coroutine uses while this one waits is not its own."""
    burned = asyncio.Event()

    @track_task_performance
    async def waits() -> str:
        burn(0.02)
        await burned.wait()
        return "done"

    waiting = asyncio.create_task(waits())
    await asyncio.sleep(0)
    burn(0.3)
    burned.set()

    assert await waiting == "done"
    assert 0.02 <= logged(log, "cpu_seconds") < 0.2
    assert logged(log, "wall_seconds") >= 0.3


async def test_cancellation_reaches_the_coroutine() -> None:
    """A cancelled tracked coroutine can clean up, and swallow nothing by itself."""
    seen: list[str] = []

    @track_task_performance
    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            seen.append("cleaned up")
            raise

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cleaned up"]


def test_coroutine_that_is_thrown_away_is_closed() -> None:
    """Closing the tracked coroutine closes the function's own."""
    seen: list[str] = []

    @track_task_performance
    async def waits() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            seen.append("closed")

    coroutine = waits()
    coroutine.send(None)
    coroutine.close()

    assert seen == ["closed"]


async def test_error_passes_and_the_call_is_measured(log: pytest.LogCaptureFixture) -> None:
    """An error is the caller's as ever; the line is logged all the same."""

    @track_task_performance
    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError("no such page")

    with pytest.raises(LookupError, match="no such page"):
        await fails()
    assert len(log.records) == 1


def test_tracked_function_within_a_tracked_one_belongs_to_it(log: pytest.LogCaptureFixture) -> None:
    """One line for the outer one."""
    inner = track_task_performance(burn)

    @track_task_performance
    def outer() -> None:
        inner(0.01)
        inner(0.01)

    outer()

    assert "outer took" in log.records[0].getMessage()
    assert logged(log, "cpu_seconds") >= 0.02


@on_linux
def test_peak_is_that_of_the_call_and_not_of_one_before(log: pytest.LogCaptureFixture) -> None:
    """The mark is set back when a call begins, and shows memory that was given back before the call ended."""
    tracked: Callable[[int], int] = track_task_performance(hold_memory)

    tracked(200 * MIB)
    tracked(1 * MIB)

    large, small = (record.__dict__["peak_memory"] for record in log.records)
    assert large - small > 100 * MIB


@on_linux
def test_call_that_begins_meanwhile_does_not_hide_a_peak(log: pytest.LogCaptureFixture) -> None:
    """Setting the mark back for one call keeps what others that are under way had reached."""
    reached, other_done = threading.Event(), threading.Event()

    @track_task_performance
    def large() -> None:
        hold_memory(200 * MIB)
        reached.set()
        other_done.wait(30)

    thread = threading.Thread(target=large)
    thread.start()
    reached.wait(30)
    track_task_performance(hold_memory)(MIB)
    other_done.set()
    thread.join()

    peaks = {
        record.getMessage().split(" took")[0].rsplit(".", 1)[1]: record.__dict__["peak_memory"]
        for record in log.records
    }
    assert peaks["large"] - peaks["hold_memory"] > 100 * MIB


def test_generator_is_refused() -> None:
    """Its body does not run when it is called: nothing could be measured."""

    async def pages() -> Any:
        yield 1

    with pytest.raises(ConfigurationError, match="generator; decorate the one that iterates it"):
        track_task_performance(pages)


def test_task_is_returned_as_it_is_and_not_asked() -> None:
    """Above a registration: asking the task's stand-in at import would finalize the app before it is configured."""
    app = Celery("early", set_as_current=False)

    @shared_task(name="tests.metrics.early")
    def early() -> None: ...

    assert track_task_performance(early) is early
    assert not app.finalized
