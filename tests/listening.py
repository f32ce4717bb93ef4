"""Listening to Celery's events, as Flower does."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.processes import Project


class Heard:
    """The events that arrive while a receiver listens."""

    def __init__(self, events: Any, came: list[dict[str, Any]]) -> None:
        self._events = events
        self._came = came

    def now(self) -> list[dict[str, Any]]:
        """All that have come, in the order in which they came."""
        with suppress(TimeoutError):
            self._events.drain_events(timeout=0.1)
        return self._came

    def of(self, run_id: str) -> list[str]:
        """The kinds of a run's events."""
        return [event["type"] for event in self.now() if event.get("uuid") == run_id]


@contextmanager
def listening(project: Project) -> Iterator[Heard]:
    """Hear all events that are sent inside."""
    app, came = project.app, list[dict[str, Any]]()
    with app.connection_for_read() as connection:
        receiver: Any = app.events.Receiver(connection, handlers={"*": lambda event: came.append(dict(event))})
        with receiver.consumer_context() as (events, *_):
            heard = Heard(events, came)
            heard.now()  # subscribes
            yield heard
