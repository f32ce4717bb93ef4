"""track_task_performance: CPU time and peak memory of a function, kept with the run that calls it.

Wall time is recorded for every run. What the other two mean:

CPU seconds: in a child of the prefork pool, which executes one run at a time, the CPU time of the whole process, its
threads and child coroutines included. Elsewhere, where other work shares the process, the thread's CPU time in a sync
function, and that of the coroutine's own steps in an async one; tasks that it creates and threads that it starts are
then not counted.

Peak memory: the highest resident memory of the process while the function ran, in bytes, with all that the process
holds. Linux keeps that mark (VmHWM) and lets a process reset it; elsewhere it is the higher of two readings, before and
after.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
import time
import types
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from llmtasks.attempt.calling import decorate_later, hold_here, is_task
from llmtasks.bridge import name_of
from llmtasks.errors import ConfigurationError
from llmtasks.owner import in_pool_child

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])

_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
#: What proc(5) says to write there to set the mark of the peak back to what is resident now.
_RESET_PEAK: Final = "5"

#: A tracked function called by a tracked one is part of it.
_inside: ContextVar[bool] = ContextVar("llmtasks_metrics_inside", default=False)


def track_task_performance(function: F) -> F:
    """Measure a function, sync or async: on its run where it is called by one, in one log line elsewhere.

    Goes above or below ``@task_registry.register``. Above it, what is measured are the runs, not inline calls.

    Raises:
        ConfigurationError: The function is a generator, whose body does not run when it is called.
    """
    if is_task(function):
        decorate_later(function, track_task_performance)
        return function
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(
            f"track_task_performance({name_of(function)}): expected a function that returns, this is a generator; "
            "decorate the one that iterates it"
        )
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def track_async(*args: Any, **kwargs: Any) -> Any:
            with _measured(function) as measure:
                return await _stepping(function(*args, **kwargs), measure)

        return track_async  # type: ignore[return-value]  # it has the function's own signature

    @functools.wraps(function)
    def track(*args: Any, **kwargs: Any) -> Any:
        with _measured(function) as measure:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                measure.own_cpu += time.thread_time() - began

    return track  # type: ignore[return-value]  # it has the function's own signature


@dataclass(eq=False, slots=True)
class _Measure:
    """What one call took so far; seconds and bytes."""

    #: CPU time of the function's own thread, or of the coroutine's own steps.
    own_cpu: float = 0.0
    peak: int = 0


class _PeakMemory:
    """The process's mark of its peak, shared by all calls that are measured at the same time.

    Each reset would take the peak so far from the calls that are under way, so it is noted with them before.
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._open: set[_Measure] = set()

    def begin(self, measure: _Measure) -> None:
        """Watch the peak for a call."""
        with self._lock:
            self._note()
            measure.peak = resident_peak(reset=True)
            self._open.add(measure)

    def end(self, measure: _Measure) -> None:
        """Note the peak of a call that is over."""
        with self._lock:
            self._note()
            self._open.discard(measure)

    def _note(self) -> None:
        if self._open:
            peak = resident_peak()
            for measure in self._open:
                measure.peak = max(measure.peak, peak)


_peak_memory: Final = _PeakMemory()


def resident_peak(*, reset: bool = False) -> int:
    """The highest resident memory since the last reset, in bytes; the present one where nothing keeps the highest.

    Args:
        reset: Set the mark back to what is resident now, and return that.
    """
    try:
        if reset:
            _CLEAR_REFS.write_text(_RESET_PEAK)
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux, or a sandbox without /proc
    import psutil  # only where it measures

    return int(psutil.Process().memory_info().rss)


@contextmanager
def _measured(function: Callable[..., Any]) -> Generator[_Measure]:
    """Measure the block and keep or log what it took; a block within a measured one belongs to that."""
    measure = _Measure()
    if _inside.get():
        yield measure
        return
    hold = hold_here()
    whole_process = in_pool_child()
    token = _inside.set(True)
    _peak_memory.begin(measure)
    began, cpu_began = time.monotonic(), time.process_time()
    try:
        yield measure
    finally:
        _inside.reset(token)
        cpu = time.process_time() - cpu_began if whole_process else measure.own_cpu
        _peak_memory.end(measure)
        if hold is not None:
            hold.cpu_seconds = (hold.cpu_seconds or 0.0) + cpu
            hold.peak_memory = max(hold.peak_memory or 0, measure.peak)
        else:
            wall = time.monotonic() - began
            logger.info(
                "%s took %.3f s, %.3f s of CPU, peak memory %.1f MiB",
                name_of(function),
                wall,
                cpu,
                measure.peak / 2**20,
                extra={"wall_seconds": wall, "cpu_seconds": cpu, "peak_memory": measure.peak},
            )


@types.coroutine
def _stepping(coroutine: Coroutine[Any, Any, Any], measure: _Measure) -> Generator[Any, Any, Any]:
    """Await a coroutine and count the CPU time of its own steps; what others do while it waits is not its own."""
    step = functools.partial(coroutine.send, None)
    while True:
        began = time.thread_time()
        try:
            awaited = step()
        except StopIteration as stop:
            return stop.value
        finally:
            measure.own_cpu += time.thread_time() - began
        try:
            value = yield awaited
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:
            step = functools.partial(coroutine.throw, error)
        else:
            step = functools.partial(coroutine.send, value)
