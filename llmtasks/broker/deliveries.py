"""What a consumer has fetched and not acknowledged: stamped while it is held, and given back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads

from llmtasks.broker import scripts
from llmtasks.broker.turns import Turns
from llmtasks.broker.upkeep import SLICE, Upkeep

logger = logging.getLogger(__name__)

#: The key in a message's ``delivery_info`` that says how often it was delivered: 1 for the first time, one more for
#: each delivery that was rejected back into its queue or whose holder died. What a consumer gives back at its own end
#: does not count.
COUNT: Final = "delivery_count"

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
        #: Tags that are settled here and not yet in Redis.
        self.owed: set[str] = set()
        #: Nothing more will be fetched.
        self.closed = False
        self._turns: Turns = self.channel.turns
        self._unsent = False
        self._lock = threading.Lock()  # guards what is owed: threads acknowledge, and so does the one that pays
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

    def room(self) -> int | None:
        """How many more may be fetched; None for no limit."""
        if "can_consume" in vars(self):  # Celery's worker_disable_prefetch (tasks.py:60) answers for one at a time
            return 1
        room: int | None = self.can_consume_max_estimate()
        return room

    def hold(self, tag: str, payload: Any) -> None:
        """Hold a delivery that no consumer has seen yet, so that it is stamped and counts."""
        if self._dirty:
            self._flush()
        self._delivered[tag] = payload

    def holds(self, tag: str) -> bool:
        """Whether a delivery is still held: not, where its channel was closed meanwhile."""
        return tag in self._delivered

    def let_go(self, tag: str) -> None:
        """Hold a delivery no longer."""
        self._delivered.pop(tag, None)

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
                self.restore_by_tag(delivery_tag, leftmost=True, counts=True)
            except self.channel.connection_errors as error:
                logger.warning("a message goes back to its queue when the broker is back: %s", error)
        _VirtualQoS.ack(self, delivery_tag)

    def settle(self, tag: str) -> None:
        """Take a delivery out of Redis: together with others in this turn of the event loop, without one at once.

        If the process is killed before that, the message comes again, as it would had it been killed just before.
        """
        with self._lock:
            self.owed.add(tag)
            self._unsent = True
        if self.closed or not self._turns.gathers(self.send):
            self.send()

    def send(self) -> None:
        """Take out of Redis what was settled since the last time; what that fails for, the thread does."""
        if not self._unsent:
            return
        try:
            with self.channel.conn_or_acquire() as client:
                self.pay(client)
        except (*self.channel.connection_errors, self.channel.ResponseError) as error:
            logger.debug("acknowledged when the broker is back: %s", error)

    def pay(self, client: Any) -> None:
        """Take out of Redis what is owed."""
        with self._lock:
            self._unsent = False
            tags = tuple(self.owed)
        keys = self.channel.delivery_keys
        for start in range(0, len(tags), SLICE):
            some = tags[start : start + SLICE]
            client.eval(scripts.SETTLE, len(keys), *keys, *some)
            with self._lock:
                self.owed.difference_update(some)

    def claim(self, tags: Sequence[str]) -> set[str]:
        """Stamp deliveries; which of them nobody took away."""
        keys = self.channel.delivery_keys
        with self.channel.conn_or_acquire() as client:
            return {tag.decode() for tag in client.eval(scripts.CLAIM, len(keys), *keys, *tags)}

    def give_back(self, tags: Sequence[str]) -> None:
        """Put what no consumer has seen back at the front, in the order in which it was there."""
        for tag in tags:
            self.let_go(tag)
        try:
            with self.channel.conn_or_acquire() as client:
                self._put_back(client, tags)
        except self.channel.connection_errors as error:
            logger.warning("what was fetched and not delivered goes back when the broker is back: %s", error)

    def keep(self, tags: Collection[str]) -> None:
        """Hold no others: what else was fetched is stamped no more, and somebody will restore it."""
        for tag in set(self._delivered) - set(tags):
            self.let_go(tag)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: kombu calls this from its event loop, which may be busy or have ended. The thread does it."""

    def restore_unacked(self, client: Any = None) -> None:
        """Put everything back at the front of its queue, in the order in which it was there."""
        with self.channel.conn_or_acquire(client) as client:
            self._put_back(client, tuple(self._delivered))
        self._delivered.clear()

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Put everything back, once, at the end; what cannot be put back now comes back when its stamp is old."""
        self.send()
        try:
            super().restore_unacked_once(stderr=stderr)
        except self.channel.connection_errors as error:
            logger.warning("what was fetched and not started goes back when the broker is back: %s", error)
            self._delivered.clear()
        finally:
            self.closed = True
            self.send()
            if self._upkeep is not None:
                self._upkeep.stir()

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False, *, counts: bool = False) -> None:
        """Put one delivery's message back into the queue that it came from, at the front or, ``leftmost``, the end."""
        with self.channel.conn_or_acquire(client) as client:
            kept = client.hget(self.unacked_key, tag)
            if kept is not None:
                self.restore(client, [(tag, kept)], side="LPUSH" if leftmost else "RPUSH", counts=counts)

    def restore(
        self,
        client: Any,
        found: Iterable[tuple[str, bytes]],
        *,
        side: str = "RPUSH",
        age: float | str = "",
        counts: bool,
    ) -> int:
        """Put messages back into the queues that they came from, one after the other; see `scripts.RESTORE`.

        Args:
            client: The Redis client to use.
            found: Deliveries' tags, each with what `scripts.FETCH` wrote down.
            side: RPUSH for the front of the queue, LPUSH for its end.
            age: Only if the stamp is older than this many seconds.
            counts: This delivery counts in the message's delivery count.

        Returns:
            How many it was this call that put back.
        """
        with client.pipeline(transaction=False) as pipe:
            for tag, kept in found:
                key, text = _split(kept)
                self._move(pipe, tag, _redelivered(text, counts), key, side, age)
            return sum(pipe.execute())

    def _put_back(self, client: Any, tags: Sequence[str]) -> None:
        """Put what was fetched in this order back at the front, the last one first."""
        for end in range(len(tags), 0, -SLICE):
            some = tags[max(0, end - SLICE) : end][::-1]
            with client.pipeline(transaction=False) as pipe:
                for tag in some:
                    pipe.hget(self.unacked_key, tag)
                found = zip(some, pipe.execute(), strict=True)
            self.restore(client, [(tag, kept) for tag, kept in found if kept is not None], counts=False)

    def set_aside(self, client: Any, tag: str, key: str) -> None:
        """Move one delivery's message, as it is, to the end of list ``key``."""
        kept = client.hget(self.unacked_key, tag)
        if kept is not None:
            self._move(client, tag, _split(kept)[1], key, "RPUSH", "")

    def _move(self, client: Any, tag: str, text: str | bytes, key: str, side: str, age: float | str) -> None:
        keys = [*self.channel.delivery_keys, key, self.channel.wake_key(self.channel.queue_of(key))]
        client.eval(scripts.RESTORE, len(keys), *keys, tag, text, side, age)


def _split(kept: bytes) -> tuple[str, bytes]:
    """The key of the queue and the message, of what `scripts.FETCH` wrote down."""
    length, _, rest = kept.partition(b":")
    return rest[: int(length)].decode(), rest[int(length) :]


def count_delivery(payload: Any) -> None:
    """Raise a message's delivery count by one; it has none before its first delivery."""
    info = payload["properties"].setdefault("delivery_info", {})
    before = info.get(COUNT)
    info[COUNT] = before + 1 if isinstance(before, int) else 1


def _redelivered(text: bytes, counts: bool) -> str | bytes:
    """The message marked as kombu marks one that comes again (redis.py:1265); as it is where it is not kombu's."""
    try:
        payload = loads(bytes_to_str(text))
        payload["headers"]["redelivered"] = True
        payload["properties"]["delivery_info"]["redelivered"] = True
        if counts:
            count_delivery(payload)
        return str(dumps(payload))
    except (ValueError, TypeError, KeyError):
        return text
