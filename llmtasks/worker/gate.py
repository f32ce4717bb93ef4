"""The gate before the pool: of a function with ``max_concurrency`` so many runs pass at once, the others wait here.

A waiting message is fetched and not acknowledged: the transport stamps it, nobody claims it in the ledger, and it takes
neither a place in the pool nor one of the messages that the worker may fetch ahead. Of `HELD` messages and more those
of Redis go back to the end of their queue, `ROTATED` a second: others come forward, and other workers have them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from celery import bootsteps
from celery.worker import state as worker_state
from celery.worker.consumer.tasks import Tasks

from llmtasks import sender
from llmtasks.run_task import RunTask

logger = logging.getLogger(__name__)

#: Messages that wait in one worker process, each of which lets it fetch one more.
HELD: Final = 1_000
#: Further ones that do, until they go back to the broker.
ROTATED: Final = 100
#: Seconds after which those that are too many go back.
GIVE_BACK_EVERY: Final = 1.0


#: It has no types.
_Step: Any = bootsteps.StartStopStep


class Gated:
    """What a request of Celery's tells the gate: that its run has ended, or was given back. A base of our requests."""

    #: The gate that it passed or waits at.
    gate: Gate | None = None

    def acknowledge(self) -> None:
        """Acknowledge the message."""
        request: Any = super()
        request.acknowledge()
        self._leave()

    def reject(self, requeue: bool = False) -> None:
        """Reject the message, or give it back."""
        request: Any = super()
        request.reject(requeue)
        self._leave()

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        request: Any = super()
        request._announce_cancelled(emit_retry=emit_retry)
        self._leave()

    def _leave(self) -> None:
        if self.gate is not None:
            self.gate.leave(self)


@dataclass(eq=False, slots=True)
class _Line:
    """The runs of one function in this worker."""

    limit: int
    running: set[Any] = field(default_factory=set)
    #: Requests, each with the QoS that may fetch one more message for it.
    waiting: deque[tuple[Any, Any]] = field(default_factory=deque)
    #: Some thread starts what waits.
    is_moving: bool = False


class Gate:
    """Hands requests to the pool, of each function at most ``max_concurrency`` at once, in the order of arrival.

    Requests come in the main thread; their ends may be told in others (the threads pool's).

    Args:
        consumer: Celery's.
        hand_over: Gives a request to the pool.
    """

    def __init__(self, consumer: Any, hand_over: Callable[[Any], Any]) -> None:
        self._consumer = consumer
        self._hand_over = hand_over
        self._lock = threading.Lock()
        self._lines: dict[str, _Line] = {}
        #: More than may wait here.
        self._excess: deque[tuple[Any, Any]] = deque()
        self._held = 0
        #: Whether what waits may still start.
        self.is_open = True

    def enter(self, request: Any) -> None:
        """Hand a request to the pool, now or when there is a place for its function."""
        task = request.task
        limit = task.options.max_concurrency if isinstance(task, RunTask) else None
        if limit is None or request.request_dict.get(sender.DELIVER_HEADER):
            self._hand_over(request)
            return
        with self._lock:
            line = self._lines.setdefault(task.name, _Line(limit))
            line.limit = limit
            if self._held >= HELD and self._gives_back():
                self._excess.append((request, self._fetch_one_more(len(self._excess) < ROTATED)))
                return
            request.gate = self
            line.waiting.append((request, None))
        self._move(line)
        with self._lock:  # it did not pass
            if line.waiting and line.waiting[-1] == (request, None):
                self._held += 1
                line.waiting[-1] = (request, self._fetch_one_more(self._held <= HELD))

    def leave(self, request: Any) -> None:
        """A request's message is acknowledged or given back."""
        line = self._lines[request.task.name]
        with self._lock:
            line.running.discard(request)
        self._move(line)

    def _move(self, line: _Line) -> None:
        """Let pass what may. What a start ends at once, as a revoked run's, is met by this loop, not by another."""
        with self._lock:
            if line.is_moving:
                return
            line.is_moving = True
        while True:
            with self._lock:
                if not (self.is_open and line.waiting and len(line.running) < line.limit):
                    line.is_moving = False
                    return
                request, quality = line.waiting.popleft()
                line.running.add(request)
                self._let_go(quality)
            try:
                self._hand_over(request)
            except BaseException:
                with self._lock:
                    line.running.discard(request)
                    line.is_moving = False
                raise

    def give_back_excess(self) -> None:
        """Give back to the broker what is more than may wait here."""
        with self._lock:
            excess, self._excess = self._excess, deque()
            for _, quality in excess:
                self._fetch_one_less(quality)
        _give_back(request for request, _ in excess)

    def give_back(self) -> None:
        """Give back to the broker what waits here."""
        with self._lock:
            waiting = [request for line in self._lines.values() for request, _ in line.waiting]
            self._forget_waiting()
        self.give_back_excess()
        _give_back(waiting)

    def forget(self) -> None:
        """The connection is gone, and with it what is not with the pool: the broker gives it out again."""
        with self._lock:
            self._forget_waiting()
            self._excess.clear()
            for line in self._lines.values():
                line.running = {request for request in line.running if request._apply_result is not None}

    def described(self) -> dict[str, dict[str, int]]:
        """How many runs of each function pass at once, run and wait."""
        with self._lock:
            return {
                name: {"limit": line.limit, "running": len(line.running), "waiting": len(line.waiting)}
                for name, line in self._lines.items()
            }

    def _forget_waiting(self) -> None:
        for line in self._lines.values():
            line.waiting.clear()
        self._held = 0

    def _let_go(self, quality: Any) -> None:
        if quality is not None:
            self._held -= 1
            self._fetch_one_less(quality)

    def _fetch_one_more(self, wanted: bool) -> Any:
        """Let the worker fetch one message more; returns the QoS that does, or something else where none does."""
        if not wanted:
            return False
        self._consumer.qos.increment_eventually()
        return self._consumer.qos

    def _fetch_one_less(self, quality: Any) -> None:
        if quality and quality is self._consumer.qos:  # each connection has its own
            quality.decrement_eventually()

    def _gives_back(self) -> bool:
        """Whether what goes back does so to the end of its queue: others put it where it was, to be fetched at once."""
        return bool(self._consumer.connection.transport.driver_type == "redis")


class Limits(_Step):  # type: ignore[misc]  # Any as a base, see above
    """Gives back in time what is too much for the consumer's gate, and tells ``inspect stats`` of it."""

    requires = (Tasks,)

    def start(self, consumer: Any) -> None:
        """The worker consumes."""
        self._timer = consumer.timer.call_repeatedly(GIVE_BACK_EVERY, consumer.gate.give_back_excess)

    def stop(self, consumer: Any) -> None:
        """It does not any more."""
        self._timer.cancel()

    def info(self, consumer: Any) -> dict[str, Any]:
        """Of each limited function how many run and wait."""
        return {"max_concurrency": consumer.gate.described()}


def _give_back(requests: Any) -> None:
    for request in requests:
        request.gate = None
        worker_state.task_ready(request)
        request.reject(requeue=True)
