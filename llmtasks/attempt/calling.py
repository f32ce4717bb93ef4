"""Call: the function itself; only in here may a soft limit or a cancellation interrupt."""

from __future__ import annotations

import asyncio
import inspect
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import celery
from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery._state import get_current_task
from celery.exceptions import NotRegistered
from celery.local import Proxy

from llmtasks import bridge
from llmtasks.bridge import Body
from llmtasks.holding import Hold, hold_of, holdings
from llmtasks.owner import in_pool_child


class _Current(threading.local):
    """The attempt of this thread."""

    body: Body | None = None
    #: The same until the function itself takes it; what it calls in turn has handles of its own.
    untaken: Body | None = None
    inside: bool = False


current: Final = _Current()


def call(task: Any, hold: Hold, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function; only in here may a soft limit or a cancellation interrupt.

    Raises:
        WorkerLostError: The function raised what would end the worker, and this is no child that the pool replaces.
        NotYours: The run was given up before.
    """
    hold.body.is_async = inspect.iscoroutinefunction(getattr(task, "function", None))
    try:
        holdings.set_calling(hold, True)
        return call_function(task, hold.body, args, kwargs)
    finally:
        holdings.set_calling(hold, False)


def call_function(task: Any, body: Body, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function with the handle by which others interrupt it. Raises as ``call`` does."""
    body.is_async = inspect.iscoroutinefunction(getattr(task, "function", None))
    try:
        body.started = time.monotonic()
        current.body = current.untaken = body
        return task.run(*args, **kwargs)
    except BaseException as error:
        if isinstance(error, Exception | asyncio.CancelledError) or in_pool_child():
            raise
        raise WorkerLostError(f"the function raised {error!r}, which would have ended its worker") from error
    finally:
        current.body = current.untaken = None


def as_failure(error: Exception | asyncio.CancelledError) -> Exception:
    """What left the function, for Celery's tracer: a cancellation from inside of it is an ordinary failure."""
    if isinstance(error, asyncio.CancelledError):
        return RuntimeError("the function's coroutine was cancelled from within")
    return error


def call_body(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``task.run`` does: the function itself, in the attempt of this thread if there is one."""
    if _decorated_later:
        function = _decorated(function)
    body, current.untaken = current.untaken or Body(), None
    return bridge.call(function, args, kwargs, body)


def hold_here() -> Hold | None:
    """What is held for the run on whose behalf this code runs, in whatever thread or coroutine of it."""
    task: Any = get_current_task()
    return None if task is None else hold_of(task.request)


def is_task(function: object) -> bool:
    """Whether this is a Celery task, or what stands for one; asking a stand-in itself would finalize the app."""
    return issubclass(type(function), Proxy | celery.Task)


def decorate_later(task: Any, decorator: Callable[..., Any]) -> None:
    """Apply a decorator to the function of a task that is registered already, when its first run is called."""
    _decorated_later.append((task, decorator))


_decorated_later: Final[list[tuple[Any, Callable[..., Any]]]] = []
_decorated_functions: Final[dict[Callable[..., Any], Callable[..., Any]]] = {}


def _decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    found = _decorated_functions.get(function)
    if found is None:
        found = function
        for task, decorator in _decorated_later:
            if _function_of(task) is function:
                found = decorator(found)
        _decorated_functions[function] = found
    return found


def _function_of(task: Any) -> Any:
    """The function of a task; None where the current app does not know the task."""
    try:
        return getattr(task, "function", None)
    except NotRegistered:
        return None


_soft_signal_installed = False


def install_soft_limit() -> None:
    """Let prefork's soft limit reach the function, and nothing else.

    billiard's own handler raises wherever the main thread happens to be: in our SQL, in the tracer, in asyncio.
    """
    global _soft_signal_installed
    if _soft_signal_installed or not in_pool_child() or threading.current_thread() is not threading.main_thread():
        return
    _soft_signal_installed = True
    signal.signal(signal.SIGUSR1, _on_soft_limit)


def _on_soft_limit(_signum: int, _frame: FrameType | None) -> None:
    body = current.body
    if body is None:
        task: Any = get_current_task()
        if current.inside or task is None or hasattr(type(task), "takes_self"):
            return  # claiming, finishing, telling, or between two tasks: no function is running
        raise SoftTimeLimitExceeded  # a task that is not ours
    if body.soft_limit is not None and time.monotonic() - body.started < body.soft_limit * 0.9:
        return  # meant for the run before this one, or counted from the message: the heart sends it again in time
    if not body.is_async:
        if body.exceeded:
            return  # it was told
        body.exceeded = True
        raise SoftTimeLimitExceeded(body.soft_limit)
    if body.is_current() and not body.exceeded:
        body.exceeded = True  # its own code blocks the loop: nothing but this can interrupt it
        raise SoftTimeLimitExceeded(body.soft_limit)
    body.exceed()
