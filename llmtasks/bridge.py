"""From Celery's sync tracer to a coroutine: on which loop it runs, how it is interrupted, whose request it sees.

In a process whose tracer runs in the main thread (prefork, solo) the loop is the main thread's own; it stands still
between runs and is never closed, so that clients and engines made in one run serve the next. Tracers in other threads
(the threads pool) share one loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery import _state
from celery.utils.threads import LocalStack

from llmtasks.options import HARD_LIMIT_MARGIN

R = TypeVar("R")
logger = logging.getLogger(__name__)

#: The tracer on whose behalf this code runs; set inside a coroutine, its children and ``asyncio.to_thread``.
_tracer: contextvars.ContextVar[Any] = contextvars.ContextVar("llmtasks_tracer", default=None)


class NotYours(asyncio.CancelledError):
    """The run went to another worker; the body is to stop and its end counts for nothing."""


class TimeIsUp(SoftTimeLimitExceeded, asyncio.CancelledError):
    """The soft limit inside a coroutine.

    A cancellation too, because that is what task groups, ``wait_for`` and others look for to end what they started.
    """


@dataclass(eq=False, slots=True)
class Body:
    """A function body that runs now, and the way to interrupt it from another thread or a signal handler."""

    soft_limit: float | None = None
    started: float = field(default_factory=time.monotonic)
    is_async: bool = False
    #: What is to be raised inside the coroutine, or was. The first wins, save that a cancellation follows a soft limit.
    interruption: asyncio.CancelledError | None = None
    thrown: bool = False
    #: The soft limit was passed and said; it is said once.
    exceeded: bool = False
    _loop: asyncio.AbstractEventLoop | None = None
    _task: asyncio.Task[Any] | None = None

    def interrupt(self, error: asyncio.CancelledError) -> bool:
        """Raise ``error`` inside the coroutine at its next await; say whether there is a coroutine to interrupt."""
        if not self.is_async or self._loop is None or self._task is None:
            return False
        if self.interruption is None or (self.thrown and isinstance(self.interruption, TimeIsUp)):
            self.interruption, self.thrown = error, False
            self._loop.call_soon_threadsafe(self._task.cancel)
        return True

    def is_starting(self) -> bool:
        """Whether it is a coroutine that does not run yet, so that nothing can interrupt it for a moment."""
        return self.is_async and self._task is None

    def exceed(self) -> None:
        """Tell the coroutine, once, that its time is up."""
        if not self.exceeded:
            self.exceeded = True
            self.interrupt(TimeIsUp(self.soft_limit))

    def is_overdue(self) -> bool:
        """Whether it passed its soft limit untold: the timer of a coroutine needs a loop that is not blocked."""
        if self.exceeded or self.soft_limit is None or self.is_starting():
            return False
        return time.monotonic() - self.started > self.soft_limit

    def attach(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        """The coroutine runs as this task."""
        self._loop, self._task = loop, task

    def meaning_of(self, error: asyncio.CancelledError) -> BaseException:
        """The error that the coroutine's cancellation stands for; code on its way may have raised a plain one anew."""
        if isinstance(self.interruption, TimeIsUp):
            return SoftTimeLimitExceeded(self.soft_limit)
        return self.interruption or error

    def is_current(self) -> bool:
        """Whether the loop executes the body's own task at this moment (asked in the loop's thread)."""
        return self._loop is not None and asyncio.current_task(self._loop) is self._task


class _Stepper(Coroutine[Any, Any, R]):
    """A coroutine in which the cancellation that ``Body.interrupt`` made becomes the error that it stands for.

    ``asyncio.Task.cancel`` is the only way to wake a task that waits; what it throws is always CancelledError.
    """

    def __init__(self, inner: Coroutine[Any, Any, R], body: Body) -> None:
        self._inner = inner
        self._body = body

    def send(self, value: Any) -> Any:
        return self._guarded(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        first = error[0] if isinstance(error[0], BaseException) else error[0](*error[1:2])
        body, wanted = self._body, self._body.interruption
        if isinstance(first, asyncio.CancelledError) and wanted is not None and not body.thrown:
            body.thrown = True
            task = asyncio.current_task()
            if isinstance(wanted, TimeIsUp) and task is not None:
                task.uncancel()  # the coroutine may catch it and go on
            return self._guarded(self._inner.throw, wanted)
        return self._guarded(self._inner.throw, first)

    @staticmethod
    def _guarded(step: Callable[[Any], Any], value: Any) -> Any:
        try:
            return step(value)
        except (SystemExit, KeyboardInterrupt) as error:
            if threading.current_thread() is threading.main_thread():
                raise
            # asyncio would end the loop with it, and the bodies of all other threads.
            raise WorkerLostError(f"the coroutine raised {error!r}, which would have ended its worker") from error

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, R]:
        return self._inner.__await__()


class _Loops:
    """The loops of this process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the loops; a forked child makes its own."""
        self._lock = threading.Lock()
        self._own: asyncio.AbstractEventLoop | None = None
        self._shared: asyncio.AbstractEventLoop | None = None

    def own(self) -> asyncio.AbstractEventLoop:
        """The main thread's loop, which runs only while a body does."""
        if self._own is None or self._own.is_closed():
            self._own = asyncio.new_event_loop()
        return self._own

    def shared(self) -> asyncio.AbstractEventLoop:
        """The loop for bodies of all other threads, running in its own thread."""
        with self._lock:
            if self._shared is None or self._shared.is_closed():
                loop = self._shared = asyncio.new_event_loop()
                threading.Thread(target=_run_for_good, args=(loop,), name="llmtasks-loop", daemon=True).start()
            return self._shared


def _run_for_good(loop: asyncio.AbstractEventLoop) -> None:
    """Run the shared loop, also after a ``sys.exit()`` in some task that a body left behind: others wait on it."""
    while True:
        try:
            loop.run_forever()
        except BaseException:
            logger.exception("something ended the loop of this process's coroutines; it goes on")
        else:
            return


_loops: Final = _Loops()
os.register_at_fork(after_in_child=_loops.reset)


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


def wait(coroutine: Coroutine[Any, Any, R], body: Body) -> R:
    """Run a coroutine on this process's loop until it is done."""
    context = contextvars.copy_context()
    context.run(_tracer.set, _ident())
    wait_on = _wait_on_own if threading.current_thread() is threading.main_thread() else _wait_on_shared
    try:
        return wait_on(_Stepper(coroutine, body), body, context)
    except asyncio.CancelledError as error:
        raise body.meaning_of(error) from error


def _wait_on_own(stepper: _Stepper[R], body: Body, context: contextvars.Context) -> R:
    loop = _loops.own()
    task = loop.create_task(stepper, context=context)
    body.attach(loop, task)
    timer = loop.call_later(body.soft_limit, body.exceed) if body.soft_limit else None
    try:
        return loop.run_until_complete(task)
    except BaseException:
        # An error that did not come from the task (a signal handler's) must not leave it behind, half done.
        if not task.done():
            task.cancel()
            loop.run_until_complete(asyncio.wait([task], timeout=HARD_LIMIT_MARGIN))
        raise
    finally:
        if timer is not None:
            timer.cancel()


def _wait_on_shared(stepper: _Stepper[R], body: Body, context: contextvars.Context) -> R:
    loop = _loops.shared()
    done = threading.Event()
    made: list[asyncio.Task[R]] = []

    def start() -> None:
        task = loop.create_task(stepper, context=context)
        made.append(task)
        body.attach(loop, task)
        if body.soft_limit:
            timer = loop.call_later(body.soft_limit, body.exceed)
            task.add_done_callback(lambda _: timer.cancel())
        task.add_done_callback(lambda _: done.set())

    loop.call_soon_threadsafe(start)
    if body.soft_limit:
        if not done.wait(body.soft_limit + HARD_LIMIT_MARGIN):
            # Nothing ends a thread; the coroutine is told to stop once more and its outcome counts for nothing.
            for task in made:
                loop.call_soon_threadsafe(task.cancel)
            raise TimeLimitExceeded(body.soft_limit + HARD_LIMIT_MARGIN)
    else:
        done.wait()
    return made[0].result()


def name_of(function: Callable[..., Any]) -> str:
    """How to name a function to people."""
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def identify(stack: Any) -> None:
    """Let a Celery stack (of current tasks, of a task's requests) know coroutines by their tracer.

    A coroutine runs in another context than its tracer, its children in others still, ``to_thread`` in another thread;
    all of them carry the tracer's identity as a context variable. ``__ident_func__`` is the stack's own, settable hook.
    """
    settable = stack
    if isinstance(stack, LocalStack):
        settable.__ident_func__ = _ident


def _ident() -> Any:
    return _tracer.get() or _get_ident()


#: Celery's stack of current tasks, which its stubs do not know.
_task_stack: Final[Any] = vars(_state)["_task_stack"]
_get_ident: Final[Callable[[], Any]] = (
    _task_stack.__ident_func__ if isinstance(_task_stack, LocalStack) else threading.get_ident
)
identify(_task_stack)
