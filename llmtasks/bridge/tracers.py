"""Celery's sync tracer on an event loop: in a greenlet, which stands aside whenever the tracer has to wait.

The coroutines themselves run on the loop as ordinary tasks: tracebacks, timeouts and task groups are asyncio's own.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, Protocol, TypeVar

from greenlet import getcurrent, greenlet

from llmtasks.bridge.deadlines import call_at_deadline
from llmtasks.bridge.identity import of_this_tracer

R = TypeVar("R")


class Traced(Protocol):
    """What a tracer runs, and who hears of it."""

    def trace(self) -> Any:
        """Run: synchronous code that may wait for futures."""
        ...

    def end(self, value: Any, error: BaseException | None) -> None:
        """It returned a value, or raised."""
        ...


class Tracer(greenlet):
    """Something synchronous that runs on a loop's thread and may wait there for futures.

    Args:
        traced: What it runs. Let go at the end: a greenlet, its contexts and what they hold know each other, and only
            the garbage collector would free all that.
        loop: The loop, in whose thread this is made and started.
        executor: Where ``in_thread`` runs what would block.
    """

    def __init__(self, traced: Traced, loop: asyncio.AbstractEventLoop, executor: Executor) -> None:
        self._loops_own = getcurrent()
        super().__init__(traced.trace, self._loops_own)
        self.loop = loop
        self.executor = executor
        self._traced: Traced | None = traced
        self.gr_context = contextvars.Context()
        #: What wakes it runs in none of its contexts.
        self._outside = contextvars.Context()

    def proceed(self, *waited_for: Any) -> None:
        """Run until there is something to wait for, or to the end; begin, or go on after what was waited for."""
        while True:
            try:
                future = self.switch(*waited_for)
            except BaseException as error:
                self._end(None, error)
                return
            if self.dead:
                self._end(future, None)
                return
            if not future.done():
                future.add_done_callback(self.proceed, context=self._outside)
                return
            waited_for = (future,)

    def _end(self, value: Any, error: BaseException | None) -> None:
        traced, self._traced = self._traced, None
        if traced is not None:
            traced.end(value, error)

    def wait_for(self, future: asyncio.Future[R], limit: float | None = None) -> R:
        """Wait for a future, called inside this greenlet.

        Raises:
            TimeoutError: It is not done after ``limit`` seconds; it goes on.
        """
        if limit is None:
            self._loops_own.switch(future)
        else:
            deadline = call_at_deadline(self.loop, limit, partial(self._stop_waiting, future))
            found = self._loops_own.switch(future)
            deadline.cancel()
            if found is None:
                raise TimeoutError
        return future.result()

    def _stop_waiting(self, future: asyncio.Future[Any]) -> None:
        if future.remove_done_callback(self.proceed):
            self.proceed(None)


def tracer_here() -> Tracer | None:
    """The tracer whose own, synchronous code this is; None in coroutines and where tracers have threads."""
    current = getcurrent()
    return current if isinstance(current, Tracer) else None


def in_thread(function: Callable[[], R]) -> R:
    """Call something that blocks: aside from the loop where a tracer on a loop asks for it, else right here."""
    tracer = tracer_here()
    if tracer is None:
        return function()
    return tracer.wait_for(tracer.loop.run_in_executor(tracer.executor, of_this_tracer().run, function))
