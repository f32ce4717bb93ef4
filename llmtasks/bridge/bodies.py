"""Body: a function's coroutine while it runs, and how it is interrupted from other threads and signal handlers."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError

from llmtasks.bridge.deadlines import Deadline, call_at_deadline
from llmtasks.bridge.zombies import zombies
from llmtasks.options import HARD_LIMIT_MARGIN

R = TypeVar("R")


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
    #: Seconds after which nobody waits for a coroutine any more, whatever it does; None is 30 after the soft limit.
    hard_limit: float | None = None
    #: Names the run and its function in the log.
    name: str = "a coroutine outside any run"
    started: float = field(default_factory=time.monotonic)
    is_async: bool = False
    #: What is to be raised inside the coroutine, or was. The first wins, save that a cancellation follows a soft limit.
    interruption: asyncio.CancelledError | None = None
    thrown: bool = False
    #: The soft limit was passed and said; it is said once.
    exceeded: bool = False
    #: Nobody waits for it any more: its hard limit is over.
    abandoned: bool = False
    #: The coroutine has ended.
    _over: bool = False
    _deadline: Deadline | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _task: asyncio.Task[Any] | None = None
    _coroutine: Coroutine[Any, Any, Any] | None = None

    def __post_init__(self) -> None:
        if self.hard_limit is None and self.soft_limit:
            self.hard_limit = self.soft_limit + HARD_LIMIT_MARGIN

    def interrupt(self, error: asyncio.CancelledError) -> bool:
        """Raise ``error`` inside the coroutine at its next await; say whether there is a coroutine to interrupt."""
        if not self.is_async or self._loop is None or self._task is None:
            return False
        if self.interruption is None or (self.thrown and isinstance(self.interruption, TimeIsUp)):
            self.interruption, self.thrown = error, False
            self._loop.call_soon_threadsafe(self._cancel)
        return True

    def abandon(self) -> None:
        """Stop waiting for the coroutine: its run is over, and it is cancelled until it ends. In the loop's thread."""
        self.abandoned = True
        self._cancel()

    def _cancel(self) -> None:
        if self._loop is None or self._task is None or self._coroutine is None:
            return
        if isinstance(self.interruption, TimeIsUp) and not self.abandoned:
            self._task.cancel()  # the coroutine may catch it and go on until its hard limit
        else:
            zombies.cancel(self._loop, self._task, self._coroutine, self.name, is_stray=self.abandoned)

    def is_starting(self) -> bool:
        """Whether it is a coroutine that does not run yet, so that nothing can interrupt it for a moment."""
        return self.is_async and self._task is None and not self._over

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

    def begin(
        self, loop: asyncio.AbstractEventLoop, stepper: Stepper[R], context: contextvars.Context
    ) -> asyncio.Task[R]:
        """Run the coroutine as a task; its soft limit counts from now."""
        context.run(_body.set, self)
        task = loop.create_task(stepper, context=context)
        self._loop, self._task, self._coroutine = loop, task, stepper.inner
        if self.soft_limit:
            self._deadline = call_at_deadline(loop, self.soft_limit, self.exceed)
        task.add_done_callback(self._end)
        return task

    def _end(self, _task: asyncio.Task[Any]) -> None:
        self._over = True
        if self._deadline is not None:
            self._deadline.cancel()
        # The task's context knows this body: without the way back both are freed at once, not by the garbage collector.
        self._task = self._coroutine = self._deadline = None

    def meaning_of(self, error: asyncio.CancelledError) -> BaseException:
        """The error that the coroutine's cancellation stands for; code on its way may have raised a plain one anew."""
        if isinstance(self.interruption, TimeIsUp):
            return SoftTimeLimitExceeded(self.soft_limit)
        return self.interruption or error

    def is_current(self) -> bool:
        """Whether the loop executes the body's own task at this moment (asked in the loop's thread)."""
        return self._loop is not None and asyncio.current_task(self._loop) is self._task


#: The body whose coroutine, child of it or thread this is.
_body: Final[contextvars.ContextVar[Body | None]] = contextvars.ContextVar("llmtasks_body", default=None)


def body_in(context: contextvars.Context) -> Body | None:
    """The body that code in this context belongs to."""
    return context.get(_body)


class Stepper(Coroutine[Any, Any, R]):
    """A coroutine in which the cancellation that ``Body.interrupt`` made becomes the error that it stands for.

    ``asyncio.Task.cancel`` is the only way to wake a task that waits; what it throws is always CancelledError.
    """

    def __init__(self, inner: Coroutine[Any, Any, R], body: Body) -> None:
        self.inner = inner
        self.body = body

    def send(self, value: Any) -> Any:
        """Go on with a value."""
        return self._guarded(self.inner.send, value)

    def throw(self, *error: Any) -> Any:
        """Go on with an error, or with the one that it stands for."""
        first = error[0] if isinstance(error[0], BaseException) else error[0](*error[1:2])
        body, wanted = self.body, self.body.interruption
        if isinstance(first, asyncio.CancelledError) and wanted is not None and not body.thrown:
            body.thrown = True
            task = asyncio.current_task()
            if isinstance(wanted, TimeIsUp) and task is not None:
                task.uncancel()  # the coroutine may catch it and go on
            return self._guarded(self.inner.throw, wanted)
        return self._guarded(self.inner.throw, first)

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
        """End it."""
        self.inner.close()

    def __await__(self) -> Generator[Any, Any, R]:
        return self.inner.__await__()
