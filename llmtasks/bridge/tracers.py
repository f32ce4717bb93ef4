"""Celery's sync tracer on an event loop: in a greenlet, which stands aside whenever the tracer has to wait.

The coroutines themselves run on the loop as ordinary tasks: tracebacks, timeouts and task groups are asyncio's own.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from llmtasks.bridge.deadlines import call_at_deadline
from llmtasks.bridge.identity import of_this_tracer

R = TypeVar("R")


class Tracer(greenlet):
    """Something synchronous that runs on a loop's thread and may wait there for futures.

    Args:
        loop: The loop, in whose thread this is made and started.
        executor: Where ``in_thread`` runs what would block.
        done: Called with what ``run`` returned, and with the error that it raised.
    """

    def __init__(
        self,
        run: Callable[[], Any],
        loop: asyncio.AbstractEventLoop,
        executor: Executor,
        done: Callable[[Any, BaseException | None], None],
    ) -> None:
        self._loops_own = getcurrent()
        super().__init__(run, self._loops_own)
        self.loop = loop
        self.executor = executor
        self._done = done
        self.gr_context = contextvars.Context()
        #: What wakes it runs in none of its contexts.
        self._outside = contextvars.Context()

    def proceed(self, *waited_for: Any) -> None:
        """Run until there is something to wait for, or to the end; begin, or go on after what was waited for."""
        while True:
            try:
                future = self.switch(*waited_for)
            except BaseException as error:
                self._done(None, error)
                return
            if self.dead:
                self._done(future, None)
                return
            if not future.done():
                future.add_done_callback(self.proceed, context=self._outside)
                return
            waited_for = (future,)

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
