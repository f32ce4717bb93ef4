"""The worker learns what is paused: functions for its claims, queues for its consumer."""

from __future__ import annotations

import logging
import threading
from typing import Any

from celery import bootsteps
from celery.worker.consumer.tasks import Tasks

from llmtasks.dispatch import station
from llmtasks.errors import LLMTasksError
from llmtasks.known_pauses import known_pauses
from llmtasks.states import PauseKind

logger = logging.getLogger(__name__)

#: It has no types.
_Step: Any = bootsteps.StartStopStep


class Pauses(_Step):  # type: ignore[misc]  # Any as a base, see above
    """Reads the pauses before the worker takes its first message, and then again and again in a thread."""

    requires = (Tasks,)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._at = station(consumer.app)
        self._queues: frozenset[str] = frozenset()
        self._cancelled: set[str] = set()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._away = False

    def start(self, consumer: Any) -> None:
        """The worker is about to consume, for the first time or on a new connection."""
        self._look()
        self._apply(consumer)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, args=(consumer,), name="llmtasks-pauses", daemon=True)
            self._thread.start()

    def shutdown(self, _consumer: Any) -> None:
        """The worker ends."""
        self._ended.set()

    def info(self, _consumer: Any) -> dict[str, Any]:
        """What ``inspect stats`` says."""
        return {"paused_queues": sorted(self._cancelled)}

    def _watch(self, consumer: Any) -> None:
        while not self._ended.wait(self._at.settings.cancel_poll):
            before = self._queues
            self._look()
            if self._queues != before:
                consumer.call_soon(self._apply, consumer)

    def _look(self) -> None:
        try:
            found = known_pauses.refresh(self._at)
        except LLMTasksError as error:
            if not self._away:
                logger.warning("what is paused cannot be read, what is known stays: %s", error)
            self._away = True
            return
        except Exception:
            logger.exception("what is paused could not be read")
            return
        self._away = False
        self._queues = frozenset(pause.name for pause in found if pause.kind is PauseKind.QUEUE)

    def _apply(self, consumer: Any) -> None:
        """Consume from what is not paused; called in the main thread."""
        if consumer.task_consumer is None:
            return  # the next connection does it
        wanted = self._queues
        for queue in sorted(wanted - self._cancelled):
            if queue in consumer.app.amqp.queues.consume_from:
                consumer.cancel_task_queue(queue)
                self._cancelled.add(queue)
        for queue in sorted(self._cancelled - wanted):
            self._cancelled.discard(queue)
            consumer.add_task_queue(queue)
