"""The receiving end: every message of a broker's queue, with the time at which it was there."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import redis

from tests.servers import Valkey

#: Seconds between two looks: a message is seen at most this much later than it came.
POLL = 0.005
#: Kombu's queue, and the same for each priority.
KEYS = ("celery", "celery\x06\x16*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A message. ``name`` is its first argument, the name of its schedule; ``id`` is the Celery task id."""

    name: str
    id: str
    at: datetime


class Arrivals:
    """Reads the queue in a thread and takes nothing away, so no message can be lost by who counts it."""

    def __init__(self, broker: Valkey) -> None:
        place = {"unix_socket_path": broker.socket} if broker.socket else {"host": "127.0.0.1", "port": broker.port}
        self._client: Any = redis.Redis(**place, decode_responses=True)
        self._read: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._seen: list[Arrival] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()

    def since(self, begin: datetime) -> list[Arrival]:
        """What came since then."""
        return [arrival for arrival in list(self._seen) if arrival.at >= begin]

    def _watch(self) -> None:
        while not self._over.wait(POLL):
            try:
                self._look()
            except redis.RedisError:  # the broker is away: that is one of the faults
                self._over.wait(POLL)

    def _look(self) -> None:
        for key in {key for pattern in KEYS for key in self._client.keys(pattern)}:
            # Kombu adds at the left: all but those read, which stand at the right.
            texts = self._client.lrange(key, 0, -1 - self._read.get(key, 0))
            at = datetime.now(UTC)
            self._read[key] = self._read.get(key, 0) + len(texts)
            self._seen += [_arrival(text, at) for text in reversed(texts)]


def _arrival(text: str, at: datetime) -> Arrival:
    message = json.loads(text)
    args, *_ = json.loads(base64.b64decode(message["body"]))
    return Arrival(name=str(args[0]) if args else "", id=message["headers"]["id"], at=at)
