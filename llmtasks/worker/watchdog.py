"""The watchdog of the asyncio pool's event loop: how late it is, and what blocks it.

A coroutine that computes, or calls something that waits without ``await``, stops all the others of its worker: they are
neither continued nor cancelled nor timed out. Their leases do not notice, because the heart has a thread of its own. So
a thread asks the loop for a sign ten times a second and looks how long that takes.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

from llmtasks.bridge import Stepper, body_in, zombies

logger = logging.getLogger(__name__)

#: Seconds between two signs that the loop is asked for.
EVERY: Final = 0.1
#: Seconds over which the worst lag is remembered.
MEMORY: Final = 60.0
#: What is shown of a stack: its innermost frames.
FRAMES: Final = 40
#: Seconds that a last message may take: a log's handler may be what blocks.
LAST_WORDS: Final = 2.0
#: The worker's exit code when its loop was blocked for too long: EX_SOFTWARE of sysexits.h.
EXIT_CODE: Final = 70

#: For such uses: the innermost frame of each thread.
_current_frames: Final[Callable[[], dict[int, FrameType]]] = vars(sys)["_current_frames"]

ADVICE: Final = (
    "Meanwhile no other coroutine of this worker goes on, is cancelled or timed out. Call what blocks by `await "
    "asyncio.to_thread(...)`, or make the task function a plain `def`, which gets a thread"
)
BLOCKED: Final = "the event loop has been blocked for %.1f s by %s. %s. It is here:\n%s"
STOOD_STILL: Final = (
    "the whole process stood still for %.1f s: a call that holds the interpreter's lock, or a machine that did not run "
    "it. The event loop is now in %s. %s. It is here:\n%s"
)
LAST_MESSAGE: Final = (
    "the event loop has been blocked for %.1f s by %s, longer than LLMTASKS_LOOP_LIMIT allows. This worker ends now; "
    "its leases give its runs to others. %s. It is here:\n%s"
)


class Watchdog:
    """Watches one loop from a thread of its own.

    Args:
        loop: The loop, which runs in another thread.
        warning: Seconds that it may be blocked before that is said.
        limit: Seconds after which the process ends; 0 is never.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, warning: float, limit: float = 0) -> None:
        self._loop = loop
        self._warning, self._limit = warning, limit
        self._every = min(EVERY, warning / 4)
        self._loops_thread: int | None = None
        #: When the sign was asked for that the loop owes.
        self._asked: float | None = None
        self._looked = 0.0
        self._lags: deque[tuple[float, float]] = deque()
        self._blockages = 0
        self._is_said = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="llmtasks-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._looked = time.monotonic()
        self._ask(self._looked)  # the loop tells its thread before anything that is given to it from now on
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stop.set()
        self._thread.join(LAST_WORDS)

    def report(self) -> dict[str, Any]:
        """Seconds by which the loop is late now and was at worst in the last minute, and how often it was blocked."""
        now, asked = time.monotonic(), self._asked
        lags = [(when, lag) for when, lag in list(self._lags) if now - when <= MEMORY]
        late = max(0.0 if asked is None else now - asked, lags[-1][1] if lags else 0.0)
        return {
            "loop_lag": round(late, 4),
            "loop_lag_worst": round(max([late, *(lag for _, lag in lags)]), 4),
            "loop_blockages": self._blockages,
        }

    # -- of the loop's thread

    def _answer(self, asked: float) -> None:
        self._loops_thread = threading.get_ident()
        self._asked = None
        self._note(time.monotonic() - asked)

    # -- of its own thread

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self._look()

    def _look(self) -> None:
        now, asked = time.monotonic(), self._asked
        # This thread was not woken either: something holds the interpreter's lock, or the process did not run at all.
        overslept = now - self._looked - self._every
        stood_still = overslept >= self._warning
        if asked is None and self._is_said:
            self._is_said = False
            _aside(lambda: logger.info("the event loop goes on; it was blocked for %.1f s", self._lags[-1][1]))
        blocked = overslept if asked is None else now - asked
        if blocked >= self._warning and not self._is_said:
            self._is_said = True
            self._blockages += 1
            self._say(logging.WARNING, STOOD_STILL if stood_still else BLOCKED, blocked)
        if asked is None:
            if stood_still:
                self._note(overslept)
            self._ask(now)
        # After standing still the loop gets another moment: nothing says that it would not have gone on.
        elif 0 < self._limit <= blocked and not stood_still:
            self._end(blocked)
        self._looked = time.monotonic()

    def _ask(self, now: float) -> None:
        self._asked = now
        try:
            self._loop.call_soon_threadsafe(self._answer, now)
        except RuntimeError:  # it is closed
            self._stop.set()

    def _note(self, lag: float) -> None:
        now = time.monotonic()
        self._lags.append((now, lag))
        while self._lags and now - self._lags[0][0] > MEMORY:
            self._lags.popleft()

    def _say(self, level: int, message: str, blocked: float) -> None:
        frame = _current_frames().get(self._loops_thread or 0)
        culprit, stack = culprit_of(self._loop, frame), stack_of(frame)
        _aside(lambda: logger.log(level, message, blocked, culprit, ADVICE, stack))

    def _end(self, blocked: float) -> None:
        self._say(logging.CRITICAL, LAST_MESSAGE, blocked)
        _aside(logging.shutdown)
        os._exit(EXIT_CODE)


def culprit_of(loop: asyncio.AbstractEventLoop, frame: FrameType | None) -> str:
    """What a loop's thread executes, in words: a run and its function where it is one's code."""
    task = asyncio.current_task(loop)
    context: Any = getattr(task, "get_context", lambda: None)()  # since Python 3.12
    for found in _frames(frame):
        owner: Any = found.f_locals.get("self") if _is_border(found) else None
        if isinstance(owner, Stepper):
            return str(owner.body.name)
        if hasattr(owner, "run_id"):
            return f"what surrounds run {owner.run_id} of {owner.args[0]} (signal handlers, callbacks)"
        context = context or getattr(owner, "_context", None)
    body = body_in(context) if isinstance(context, contextvars.Context) else None
    if body is not None:
        return f"something that {body.name} started"
    return "code outside any run" if task is None else f"task {task.get_name()}, outside any run"


def stack_of(frame: FrameType | None) -> str:
    """The innermost frames of a thread, outermost first, without those of the event loop itself."""
    inner: list[tuple[FrameType, int]] = []
    for found in _frames(frame):
        if _is_border(found) or len(inner) == FRAMES:
            break
        inner.append((found, found.f_lineno))
    return "".join(traceback.StackSummary.extract(iter(reversed(inner))).format()) or "  (in the event loop itself)\n"


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_border(frame: FrameType) -> bool:
    """Whether this frame calls into a coroutine's step, a callback of the loop, or a run's tracer."""
    where = frame.f_globals.get("__name__"), frame.f_code.co_qualname
    return where in {
        ("llmtasks.bridge.bodies", "Stepper.send"),
        ("llmtasks.bridge.bodies", "Stepper.throw"),
        ("llmtasks.bridge.bodies", "Stepper._guarded"),
        ("llmtasks.worker.pool", "Job.trace"),
        ("asyncio.events", "Handle._run"),
    }


def _aside(function: Callable[[], Any]) -> None:
    """Call something in a thread, and wait for it only so long."""
    thread = threading.Thread(target=function, name="llmtasks-last-words", daemon=True)
    thread.start()
    thread.join(LAST_WORDS)


class _Guard:
    """The watchdog of this process, while there is one."""

    watchdog: Watchdog | None = None


_guard = _Guard()


def watch(loop: asyncio.AbstractEventLoop, *, warning: float, limit: float) -> None:
    """Let this process's loop be watched from now on."""
    _guard.watchdog = Watchdog(loop, warning=warning, limit=limit)
    _guard.watchdog.start()


def stop() -> None:
    """Watch no longer."""
    if _guard.watchdog is not None:
        _guard.watchdog.stop()
        _guard.watchdog = None


def report(loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """What ``celery inspect stats`` shows of the loop and of the coroutines that do not stop."""
    watched = {} if _guard.watchdog is None else _guard.watchdog.report()
    return {"loop": type(loop).__module__.partition(".")[0], **watched, "zombies": len(zombies)}
