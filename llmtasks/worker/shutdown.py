"""A bounded shutdown: after SIGTERM runs may end within the grace; then they go back to the broker, uncounted.

Celery's cold shutdown ends prefork's children. Nothing ends a thread: where runs run in the main process itself,
coroutines are interrupted, and a function that goes on all the same ends with the process.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from llmtasks.dispatch import relay, send, station
from llmtasks.errors import LLMTasksError
from llmtasks.holding import Hold, holdings, owner_of
from llmtasks.store import outbox, rescue

logger = logging.getLogger(__name__)

#: Coroutines get this part of a lease to tidy up: nobody may call their runs lost meanwhile.
TIDY_UP: Final = 0.25


class Grace:
    """The time between SIGTERM and the end of whatever still runs."""

    def __init__(self, consumer: Any, stop_keeping: Callable[[], None]) -> None:
        self._consumer = consumer
        self._stop_keeping = stop_keeping
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """The worker takes no new messages and waits for what runs."""
        if self._timer is None:
            settings = station(self._consumer.app).settings
            self._timer = threading.Timer(settings.shutdown_grace, self._end, args=(settings.shutdown_grace,))
            self._timer.daemon = True
            self._timer.start()

    def cancel(self) -> None:
        """The worker ends: nothing is put back any more, but what is being put back now is waited for."""
        if self._timer is not None:
            self._timer.cancel()
            if threading.current_thread() is not self._timer:
                self._timer.join()

    def _end(self, seconds: float) -> None:
        logger.warning("runs still go on %s s after the shutdown began: they are put back for another worker", seconds)
        here = holdings.calls
        holds = holdings.give_up("the worker shuts down", station(self._consumer.app).settings.lease * TIDY_UP)
        for hold in holds:
            _put_back(hold)
        if holdings.calls:
            self._end_process()
        elif not holds and not here:
            os.kill(os.getpid(), signal.SIGQUIT)  # Celery's cold shutdown: what runs is in children, and they end

    def _end_process(self) -> None:
        """End without the threads that do not return; what was fetched and not started goes back to the broker."""
        self._stop_keeping()
        # An AMQP broker takes them back when the connection breaks; kombu's own transports do it on an orderly end.
        quality = getattr(self._consumer.task_consumer.channel, "qos", None)
        try:
            holdings.flush()
            if quality is not None:
                quality.restore_unacked_once()
        except Exception:
            logger.exception("messages fetched and not started stay with the broker until it gives them out again")
        logging.shutdown()
        os._exit(0)


def _put_back(hold: Hold) -> None:
    """Release a run and owe the broker a new message: the old one may be acknowledged or not, a copy does no harm."""
    at, run_id = hold.station, hold.claim.id
    now = at.database.now()
    try:
        with at.database.transaction() as tx:
            released, handed = rescue.release(tx, owner_of(), run_id, now)
            until = now + timedelta(seconds=at.settings.outbox_patience)
            messages = outbox.requeue(tx, at.name, run_id, now, until) if released else []
        send(at, messages)
        relay(at, handed)
    except LLMTasksError as away:
        logger.warning("run %s cannot be put back, its lease ends it: %s", run_id, away)
