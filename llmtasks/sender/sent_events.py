"""Sent events: that messages were sent, told in one message for a whole batch; Celery sends one beside each task."""

from __future__ import annotations

from typing import Any

import celery
from celery.events import EventDispatcher

#: The stub lacks what is overridden.
_EventDispatcher: Any = EventDispatcher


class SentEvents(_EventDispatcher):  # type: ignore[misc]  # Any as a base, see above
    """Gathers ``task-sent`` events. Whoever receives events takes a list as it takes one."""

    def __init__(self, app: celery.Celery) -> None:
        # Not enabled: it is given a producer each time, as Celery's own is (app/amqp.py:740).
        super().__init__(app=app, enabled=False, buffer_while_offline=False)
        self._gathered: list[Any] = []

    def _publish(self, event: Any, *_args: Any, **_options: Any) -> None:
        self._gathered.append(event)

    def send(self, producer: Any) -> None:
        """Send what was gathered."""
        gathered, self._gathered = self._gathered, []
        if gathered:
            super()._publish(gathered, producer, "task.multi")
