"""Aside: sending for code on an event loop, in a thread that nothing else waits for.

Not in asyncio's own: while a broker is away each of them would wait for it, and with them everybody's ``to_thread``.
One thread: two send a third more, but hand the interpreter to each other while the event loop waits for it, up to 30 ms
long instead of 4. Where a call waits, for a database or a broker that hangs, those behind it wait too.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any
from weakref import WeakKeyDictionary

from llmtasks.errors import BrokerUnavailableError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A ``delay`` that waits for a thread, and the event loop that waits for it."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    context: contextvars.Context
    asked_at: float
    task: Any
    args: Any
    kwargs: Any


_waiting: SimpleQueue[_Call] = SimpleQueue()
_thread: threading.Thread | None = None
_starting = threading.Lock()
#: When a broker last did not answer, and what was said; by app.
_outages: WeakKeyDictionary[Any, tuple[float, BrokerUnavailableError]] = WeakKeyDictionary()


async def delay(task: Any, args: Any, kwargs: Any) -> Any:
    """What ``task.delay`` returns or raises; the event loop goes on meanwhile."""
    global _thread
    # An executor does the same for four times the event loop's time.
    if _thread is None:
        with _starting:
            if _thread is None:
                thread = threading.Thread(target=_work, args=(_waiting,), name="llmtasks-adelay", daemon=True)
                thread.start()
                _thread = thread  # not if it could not be started
    loop = asyncio.get_running_loop()
    call = _Call(
        loop=loop,
        future=loop.create_future(),
        context=contextvars.copy_context(),
        asked_at=time.monotonic(),
        task=task,
        args=args,
        kwargs=kwargs,
    )
    _waiting.put(call)
    return await call.future


def _work(waiting: SimpleQueue[_Call]) -> None:
    while True:
        call = waiting.get()
        if call.future.cancelled():
            continue
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = call.context.run(_delay, call), None
        except BaseException as error:
            outcome = None, error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            call.loop.call_soon_threadsafe(_settle, call.future, *outcome)
        del call, outcome


def _delay(call: _Call) -> Any:
    """Send a run, unless another found out that the broker is away while this one waited."""
    failed_at, failure = _outages.get(call.task.app, (0.0, None))
    if failure is not None and failed_at > call.asked_at and not call.task.is_kept({}):
        raise type(failure)(str(failure)) from failure
    try:
        return call.task.delay(*call.args, **call.kwargs)
    except BrokerUnavailableError as error:
        _outages[call.task.app] = (time.monotonic(), error)
        raise


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _forget_thread() -> None:
    """A forked process does not have it, and what waits there is its parent's."""
    global _waiting, _thread, _starting
    _waiting, _thread, _starting = SimpleQueue(), None, threading.Lock()


os.register_at_fork(after_in_child=_forget_thread)
