"""Callbacks: what other threads have called in the main one, where Celery and kombu expect it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from celery.concurrency import prefork
from celery.exceptions import WorkerShutdown, WorkerTerminate

logger = logging.getLogger(__name__)


class Callbacks:
    """A queue of calls to the main thread, which takes them from Celery's event loop."""

    def __init__(self) -> None:
        self._asked: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._lock = threading.Lock()
        self._is_awaited = False
        self._stirred = threading.Event()
        self._hub: Any = None

    def go_on_with(self, hub: Any) -> None:
        """Celery's event loop runs, for the first time or again: it may have forgotten what it was to call."""
        self._hub = hub
        hub.call_soon(self.call)

    def ask(self, function: Callable[..., Any] | None, *args: Any) -> None:
        """Have something called in the main thread; from any thread."""
        if function is None:
            return
        with self._lock:
            self._asked.append((function, args))
            is_first, self._is_awaited = not self._is_awaited, True
        self._stirred.set()
        if self._hub is None:
            self.call()  # no event loop drives this transport: as Celery's threads pool does
        elif is_first:
            self._hub.call_soon(self.call)

    def call(self, patience: float = 0.0) -> None:
        """Call what was asked for; wait up to ``patience`` seconds for something."""
        if patience:
            self._stirred.wait(patience)
            self._stirred.clear()
        with self._lock:
            self._is_awaited = False
        while True:
            try:
                function, args = self._asked.popleft()
            except IndexError:
                return
            try:
                function(*args)
            except (WorkerShutdown, WorkerTerminate):
                raise
            except Exception:
                logger.exception("what follows the end of a run failed")

    def run_timers(self) -> None:
        """What Celery's loop would do beside reading messages: timers, of heartbeats too, and acknowledgements.

        Reading would give messages to a pool that closes.
        """
        if self._hub is None:
            return
        try:
            self._hub.fire_timers()
            _run_acknowledgements(self._hub)
        except Exception:
            logger.exception("a timer failed while the pool drains")


#: What Celery's own pool runs of kombu's postponed calls while it drains (concurrency/prefork.py:123).
_run_acknowledgements: Callable[[Any], None] = vars(prefork)["_run_ready_callbacks"]
