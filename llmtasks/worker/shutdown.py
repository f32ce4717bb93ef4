"""A bounded shutdown: after SIGTERM runs may end within the grace; then they go back to the broker, uncounted.

Celery's cold shutdown ends prefork's children. Nothing ends a thread: where runs run in the main process itself,
coroutines are interrupted, and a function that goes on all the same ends with the process.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from llmtasks.dispatch import station
from llmtasks.holding import holdings
from llmtasks.worker.release import put_back

logger = logging.getLogger(__name__)

#: Coroutines get this part of a lease to tidy up: nobody may call their runs lost meanwhile.
TIDY_UP: Final = 0.25
#: Stop hooks get this many seconds at least, however much of the grace the runs have used up.
LEAST_LEFT: Final = 1.0


class Grace:
    """The time between SIGTERM and the end of whatever still runs."""

    def __init__(self, consumer: Any, stop_keeping: Callable[[], None]) -> None:
        self._consumer = consumer
        self._stop_keeping = stop_keeping
        self._timer: threading.Timer | None = None
        self._began: float | None = None

    def left(self) -> float:
        """The seconds that are left for what follows the last run."""
        grace: float = station(self._consumer.app).settings.shutdown_grace
        gone = 0.0 if self._began is None else time.monotonic() - self._began
        return max(LEAST_LEFT, grace - gone)

    def begin(self) -> None:
        """The worker takes no new messages and waits for what runs."""
        if self._timer is None:
            settings = station(self._consumer.app).settings
            self._timer = threading.Timer(settings.shutdown_grace, self._end, args=(settings.shutdown_grace,))
            self._timer.daemon = True
            self._began = time.monotonic()
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
            put_back(hold.station, hold.claim.id)
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
