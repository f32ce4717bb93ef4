"""What an application opens on a worker's event loop before the first run, and closes after the last.

A client or engine that was made on a loop works only there. The hooks run on the loop on which the worker's coroutines
will run: once in the worker on the asyncio, threads and solo pools, once in each child on prefork.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import mmap
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from llmtasks.bridge import loops, name_of
from llmtasks.errors import ConfigurationError

logger = logging.getLogger(__name__)
Hook = Callable[[], Any]
H = TypeVar("H", bound=Hook)

_at_start: Final[list[Hook]] = []
_at_stop: Final[list[Hook]] = []


def on_worker_loop_start(function: H) -> H:
    """Call a function, async or sync, on the worker's event loop before the first run starts.

    Several run one after the other, in the order in which they were registered. An error in one ends the worker.
    Beats, web servers and other processes that import the module call none.

    Raises:
        ConfigurationError: It is no function that can be called without arguments.
    """
    return _register(_at_start, function, "on_worker_loop_start")


def on_worker_loop_stop(function: H) -> H:
    """Call a function, async or sync, on the worker's event loop after the last run has ended.

    Several run one after the other, the one registered last first. An error in one is logged. They are not called when
    the worker is killed, and are cut off when its grace (``LLMTASKS_SHUTDOWN_GRACE``) is over.

    Raises:
        ConfigurationError: It is no function that can be called without arguments.
    """
    return _register(_at_stop, function, "on_worker_loop_stop")


def _register(hooks: list[Hook], function: H, decorator: str) -> H:
    given: object = function
    try:
        if not callable(given):
            raise TypeError("it cannot be called")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError("it is a generator, which nobody would iterate")
        inspect.signature(function).bind()
    except TypeError as error:
        raise ConfigurationError(
            f"{decorator}({given!r}): expected a function without arguments, async or not; {error}"
        ) from None
    if function not in hooks:
        hooks.append(function)
    return function


class HookError(Exception):
    """A hook failed at the start; the cause says why."""


class _Lifespan:
    """What this process has begun. A forked child begins its own."""

    def __init__(self) -> None:
        #: Runs a coroutine on the loop and waits for it; None before the beginning and after the end.
        self.run: Callable[[Coroutine[Any, Any, None], float | None], None] | None = None
        #: One byte that the worker shares with its children: a hook failed in one of them.
        self.failed: mmap.mmap | None = None
        os.register_at_fork(after_in_child=self._in_child)

    def _in_child(self) -> None:
        self.run = None


_lifespan: Final = _Lifespan()


def begin(*, on_own: bool) -> None:
    """Call the hooks of the start, on the loop of this process's coroutines; does nothing where there are none.

    Args:
        on_own: Coroutines run on the main thread's own loop, not on the one that threads share.

    Raises:
        HookError: One failed; those after it were not called.
    """
    if not (_at_start or _at_stop):
        return
    run = _run_on_own if on_own else _run_on_shared
    run(_call_first_to_last(_at_start), None)
    _lifespan.run = run


def end(patience: float) -> None:
    """Call the hooks of the end, if those of the start were called; whatever happens in them is logged.

    Args:
        patience: Seconds that they may take together.
    """
    run, _lifespan.run = _lifespan.run, None
    if run is None:
        return
    try:
        run(_call_last_to_first(_at_stop), patience)
    except TimeoutError:
        logger.error("the worker's stop hooks were cut off: they took longer than the %.1f s that were left", patience)


def expect_children() -> None:
    """Before the pool forks: let its children say here that a hook failed."""
    if _at_start:
        _lifespan.failed = mmap.mmap(-1, 1)


def end_parent() -> None:
    """In a child: a hook failed, so the worker is to end; every other child would fail too."""
    failed = _lifespan.failed
    if failed is not None and not failed[0]:
        failed[0] = 1
        os.kill(os.getppid(), signal.SIGTERM)


def failed_in_child() -> bool:
    """Whether a hook failed in some child of this worker."""
    return _lifespan.failed is not None and bool(_lifespan.failed[0])


async def _call_first_to_last(hooks: Sequence[Hook]) -> None:
    for hook in list(hooks):
        try:
            await _call(hook)
        except Exception as error:
            raise HookError(f"its start hook {name_of(hook)} failed: {type(error).__name__}: {error}") from error


async def _call_last_to_first(hooks: Sequence[Hook]) -> None:
    for hook in reversed(hooks):
        try:
            await _call(hook)
        except Exception:
            logger.exception("the worker's stop hook %s failed", name_of(hook))


async def _call(hook: Hook) -> None:
    found = hook()
    if inspect.isawaitable(found):
        await found


def _run_on_own(coroutine: Coroutine[Any, Any, None], patience: float | None) -> None:
    loops.own().run_until_complete(asyncio.wait_for(coroutine, patience))


def _run_on_shared(coroutine: Coroutine[Any, Any, None], patience: float | None) -> None:
    running = asyncio.run_coroutine_threadsafe(coroutine, loops.shared())
    try:
        running.result(patience)
    except TimeoutError:
        running.cancel()
        raise
