"""Whose request code sees: a coroutine, its children and its threads are known by the tracer that runs them."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, Final

from celery import _state
from celery.utils.threads import LocalStack

#: The tracer on whose behalf this code runs; set inside a coroutine, its children and ``asyncio.to_thread``.
_tracer: contextvars.ContextVar[Any] = contextvars.ContextVar("llmtasks_tracer", default=None)


def identify(stack: Any) -> None:
    """Let a Celery stack (of current tasks, of a task's requests) know coroutines by their tracer.

    A coroutine runs in another context than its tracer, its children in others still, ``to_thread`` in another thread;
    all of them carry the tracer's identity as a context variable. ``__ident_func__`` is the stack's own, settable hook.
    """
    settable = stack
    if isinstance(stack, LocalStack):
        settable.__ident_func__ = ident


def ident() -> Any:
    """The tracer on whose behalf this code runs; Celery's own notion (greenlet or thread) where there is none."""
    return _tracer.get() or _get_ident()


def is_traced() -> bool:
    """Whether this code runs on behalf of a tracer's coroutine."""
    return _tracer.get() is not None


def of_this_tracer() -> contextvars.Context:
    """A copy of this context in which code counts as the present tracer's, whatever thread or task it runs in."""
    context = contextvars.copy_context()
    context.run(_tracer.set, ident())
    return context


#: Celery's stack of current tasks, which its stubs do not know.
_task_stack: Final[Any] = vars(_state)["_task_stack"]
_get_ident: Final[Callable[[], Any]] = (
    _task_stack.__ident_func__ if isinstance(_task_stack, LocalStack) else threading.get_ident
)
identify(_task_stack)
