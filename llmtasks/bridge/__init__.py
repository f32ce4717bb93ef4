"""From Celery's sync tracer to a coroutine: on which loop it runs, how it is interrupted, whose request it sees.

In a process whose tracer runs in the main thread (prefork, solo) the loop is the main thread's own; it stands still
between runs and is never closed, so that clients and engines made in one run serve the next. The asyncio pool's tracers
are greenlets on the loop of all coroutines, which they share with tracers in other threads (the threads pool).
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from billiard.exceptions import TimeLimitExceeded

from llmtasks.bridge.bodies import Body, NotYours, Stepper, TimeIsUp, body_in
from llmtasks.bridge.gathering import Gathering, Wish
from llmtasks.bridge.identity import identify, is_traced, of_this_tracer
from llmtasks.bridge.loops import loops
from llmtasks.bridge.tracers import Traced, Tracer, in_thread, tracer_here
from llmtasks.bridge.zombies import zombies
from llmtasks.options import HARD_LIMIT_MARGIN

__all__ = [
    "Body",
    "Gathering",
    "NotYours",
    "Stepper",
    "TimeIsUp",
    "Traced",
    "Tracer",
    "Wish",
    "body_in",
    "call",
    "identify",
    "in_coroutine",
    "in_thread",
    "loops",
    "name_of",
    "tracer_here",
    "wait",
    "zombies",
]

R = TypeVar("R")


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], body: Body) -> Any:
    """Call a task function, sync or async, and wait for what it returns.

    Args:
        body: The handle by which others interrupt it; its ``soft_limit`` in seconds is enforced here for coroutines
            where no signal of the pool does it.

    Raises:
        TypeError: The function is an async generator, or a sync one that returned a coroutine or async iterator.
    """
    if inspect.isasyncgenfunction(function):
        raise TypeError(
            f"task function {name_of(function)} is an async generator: nobody would iterate it; "
            "collect its items and return them"
        )
    body.is_async = inspect.iscoroutinefunction(function)
    if not body.is_async:
        value = function(*args, **kwargs)
        if inspect.isawaitable(value) or inspect.isasyncgen(value):
            if inspect.iscoroutine(value):
                value.close()
            raise TypeError(
                f"task function {name_of(function)} returned {type(value).__name__}, which nobody would await: "
                "declare it with `async def`, or return a plain value"
            )
        return value
    return wait(function(*args, **kwargs), body)


def in_coroutine() -> bool:
    """Whether this code is on the loop of a run's coroutine, of which it, or what called it, is a part."""
    return asyncio._get_running_loop() is not None and is_traced() and tracer_here() is None


def wait(coroutine: Coroutine[Any, Any, R], body: Body) -> R:
    """Run a coroutine on this process's loop until it is done.

    Raises:
        RuntimeError: Called on an event loop, which would wait for itself.
        TimeLimitExceeded: It still runs after its hard limit; its outcome counts for nothing.
    """
    context = of_this_tracer()
    tracer = tracer_here()
    if tracer is None and asyncio._get_running_loop() is not None:
        coroutine.close()
        raise RuntimeError("this runs on an event loop: await the task function instead of calling it synchronously")
    stepper = Stepper(coroutine, body)
    try:
        if tracer is not None:
            return _wait_in_tracer(tracer, stepper, body, context)
        if threading.current_thread() is threading.main_thread():
            return _wait_on_own(stepper, body, context)
        return _wait_on_shared(stepper, body, context)
    except asyncio.CancelledError as error:
        raise body.meaning_of(error) from error


def _wait_on_own(stepper: Stepper[R], body: Body, context: contextvars.Context) -> R:
    loop = loops.own()
    task = body.begin(loop, stepper, context)
    try:
        return loop.run_until_complete(task)
    except BaseException:
        # An error that did not come from the task (a signal handler's) must not leave it behind, half done.
        if not task.done():
            task.cancel()
            loop.run_until_complete(asyncio.wait([task], timeout=HARD_LIMIT_MARGIN))
        raise


def _wait_on_shared(stepper: Stepper[R], body: Body, context: contextvars.Context) -> R:
    loop = loops.shared()
    done = threading.Event()
    made: list[asyncio.Task[R]] = []

    def start() -> None:
        task = body.begin(loop, stepper, context)
        made.append(task)
        task.add_done_callback(lambda _: done.set())

    loop.call_soon_threadsafe(start)
    if not done.wait(body.hard_limit):
        # The thread goes on without it; it is told to stop until it does, and its outcome counts for nothing.
        loop.call_soon_threadsafe(body.abandon)
        raise TimeLimitExceeded(body.hard_limit)
    return made[0].result()


def _wait_in_tracer(tracer: Tracer, stepper: Stepper[R], body: Body, context: contextvars.Context) -> R:
    task = body.begin(tracer.loop, stepper, context)
    try:
        return tracer.wait_for(task, body.hard_limit)
    except TimeoutError:
        if task.done():
            raise
        body.abandon()  # its place is free for another run; as long as it goes on it counts among the zombies
        raise TimeLimitExceeded(body.hard_limit) from None


def name_of(function: Callable[..., Any]) -> str:
    """How to name a function to people."""
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"
