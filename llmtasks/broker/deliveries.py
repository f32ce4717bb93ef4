"""What a consumer has fetched and not acknowledged: stamped while it is held, and given back."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads

from llmtasks.broker import scripts
from llmtasks.broker.upkeep import Upkeep

logger = logging.getLogger(__name__)

# kombu has no types of its own.
_StockQoS: Any = stock.QoS
_VirtualQoS: Any = virtual.QoS


class Deliveries(_StockQoS):  # type: ignore[misc]  # Any as a base, see above
    """The deliveries of one channel, which kombu calls its QoS.

    A delivery tag names one delivery, not one message as in stock kombu: what a consumer that was thought dead
    acknowledges or gives back later does not touch the delivery of the same message to somebody else.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Tags that were settled while the server was away.
        self.owed: set[str] = set()
        #: Nothing more will be fetched.
        self.closed = False
        self._upkeep: Upkeep | None = None

    @property
    def held(self) -> list[str]:
        """The tags of what is fetched and not acknowledged."""
        while True:
            try:
                return [tag for tag in self._delivered if tag not in self._dirty]
            except RuntimeError:  # the consumer's thread changed it meanwhile
                continue

    def look_after(self) -> None:
        """Have a thread stamp what is held here, and restore what nobody holds, as long as there is anything to do."""
        if self._upkeep is None or not self._upkeep.is_alive():  # a forked process has none
            self._upkeep = Upkeep(self)
            self._upkeep.start()

    def append(self, message: Any, delivery_tag: str) -> None:
        """Hold a delivery. Redis has it already: what took the message out of its queue wrote it there."""
        _VirtualQoS.append(self, message, delivery_tag)
        self.look_after()

    def ack(self, delivery_tag: str) -> None:
        """Forget a delivery; while the server is away that is owed, and done when it is back."""
        self.settle(delivery_tag)
        _VirtualQoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Forget a delivery, or put its message at the end of its queue, as stock kombu does."""
        if not requeue:
            self.settle(delivery_tag)
        else:
            try:
                self.restore_by_tag(delivery_tag, leftmost=True)
            except self.channel.connection_errors as error:
                logger.warning("a message goes back to its queue when the broker is back: %s", error)
        _VirtualQoS.ack(self, delivery_tag)

    def settle(self, tag: str) -> None:
        """Take a delivery out of Redis, or owe that."""
        try:
            self._remove_from_indices(tag).execute()
        except self.channel.connection_errors:
            self.owed.add(tag)

    def pay(self, client: Any) -> None:
        """Take out of Redis what is owed."""
        for tag in tuple(self.owed):
            self._remove_from_indices(tag, client.pipeline()).execute()
            self.owed.discard(tag)

    def keep(self, tags: Collection[str]) -> None:
        """Hold no others: what else was fetched is stamped no more, and somebody will restore it."""
        for tag in set(self._delivered) - set(tags):
            self._delivered.pop(tag, None)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: kombu calls this from its event loop, which may be busy or have ended. The thread does it."""

    def restore_unacked(self, client: Any = None) -> None:
        """Put everything back at the front of its queue, in the order in which it was there."""
        with self.channel.conn_or_acquire(client) as client:
            for tag in reversed(tuple(self._delivered)):
                self.restore_by_tag(tag, client=client)
        self._delivered.clear()

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Put everything back, once, at the end; what cannot be put back now comes back when its stamp is old."""
        try:
            super().restore_unacked_once(stderr=stderr)
        except self.channel.connection_errors as error:
            logger.warning("what was fetched and not started goes back when the broker is back: %s", error)
            self._delivered.clear()
        finally:
            self.closed = True
            if self._upkeep is not None:
                self._upkeep.stir()

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        """Put one delivery's message back into the queue that it came from, at the front or, ``leftmost``, the end."""
        with self.channel.conn_or_acquire(client) as client:
            kept = client.hget(self.unacked_key, tag)
            if kept is not None:
                self.restore(client, tag, kept, side="LPUSH" if leftmost else "RPUSH")

    def restore(self, client: Any, tag: str, kept: bytes, *, side: str = "RPUSH", age: float | str = "") -> bool:
        """Put a message back into the queue that it came from; see `scripts.RESTORE`.

        Args:
            client: The Redis client to use.
            tag: The delivery's tag.
            kept: What `scripts.FETCH` wrote down.
            side: RPUSH for the front of the queue, LPUSH for its end.
            age: Only if its stamp is older than this many seconds.

        Returns:
            Whether it was this call that put it back.
        """
        key, text = _split(kept)
        return self._move(client, tag, _redelivered(text), key, side, age)

    def set_aside(self, client: Any, tag: str, key: str) -> None:
        """Move one delivery's message, as it is, to the end of list ``key``."""
        kept = client.hget(self.unacked_key, tag)
        if kept is not None:
            self._move(client, tag, _split(kept)[1], key, "RPUSH", "")

    def _move(self, client: Any, tag: str, text: str | bytes, key: str, side: str, age: float | str) -> bool:
        keys = [*self.channel.delivery_keys, key, self.channel.wake_key(self.channel.queue_of(key))]
        return bool(client.eval(scripts.RESTORE, len(keys), *keys, tag, text, side, age))


def _split(kept: bytes) -> tuple[str, bytes]:
    """The key of the queue and the message, of what `scripts.FETCH` wrote down."""
    length, _, rest = kept.partition(b":")
    return rest[: int(length)].decode(), rest[int(length) :]


def _redelivered(text: bytes) -> str | bytes:
    """The message marked as kombu marks one that comes again (redis.py:1265); as it is where it is not kombu's."""
    try:
        payload = loads(bytes_to_str(text))
        payload["headers"]["redelivered"] = True
        payload["properties"]["delivery_info"]["redelivered"] = True
        return str(dumps(payload))
    except (ValueError, TypeError, KeyError):
        return text
