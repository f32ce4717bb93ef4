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

    def send_gathered(self, producer: Any) -> None:
        """Send what was gathered."""
        gathered, self._gathered = self._gathered, []
        self._send(producer, gathered)

    def send(self, producer: Any, told: list[dict[str, Any]]) -> None:
        """Send that messages were sent, of which ``told`` has the fields."""
        self._send(producer, [self._prepare_event("task-sent", fields) for fields in told])

    def _send(self, producer: Any, events: list[Any]) -> None:
        if not events:
            return
        exchange = self.exchange
        producer.publish(
            events if len(events) > 1 else events[0],
            routing_key="task.multi" if len(events) > 1 else "task.sent",
            exchange=exchange.name,
            # kombu copies an entity each time to find out that it is declared (common.py:117).
            declare=[] if hash(exchange) in producer.connection.declared_entities else [exchange],
            serializer=self.serializer,
            headers=self.headers,
            delivery_mode=self.delivery_mode,
        )
