"""How a channel gets messages: many at once, as its prefetch allows, each noted as held before anything else happens.

One script in the server moves messages from their queues to what is unacknowledged (`scripts.FETCH`). What happens then
to a message that its consumer has not seen yet:

- The reply is not read: the worker died, or its connection did. Nobody stamps it, so somebody restores it.
- The reply is read late, because the main thread was busy, or suspended, or kombu had paused the channel for want of
  room. Others may have restored it: the channel stamps it again, and delivers only what was still there for that.
- The reply is read. The channel holds it from then on, and stamps it, also while it waits for those before it.
- Nobody wants it: its queue was cancelled, the prefetch was lowered, the callback of another one failed. It goes back
  to the front of its queue. A closed channel gives back everything that it holds.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from queue import Empty
from time import monotonic
from typing import Any, Final

from kombu.transport import redis as stock
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from kombu.utils.scheduling import priority_cycle
from kombu.utils.uuid import uuid

from llmtasks.broker import scripts
from llmtasks.broker.deliveries import Deliveries, count_delivery
from llmtasks.broker.turns import Turns

logger = logging.getLogger(__name__)

#: Messages that one fetch brings at most.
BATCH: Final = 100
#: Bytes after which a fetch takes no more messages.
BATCH_BYTES: Final = 1_000_000
#: Seconds that delivering what one fetch brought should take: remote control, timers and acknowledgements wait for
#: that. Whose callbacks take longer, like those of the solo pool, which run the task, gets fewer at once.
BATCH_SECONDS: Final = 0.02
#: The list of messages that kombu could not read.
UNREADABLE: Final = "llmtasks.unreadable"

# kombu has no types of its own.
_StockChannel: Any = stock.Channel


class Fetching(_StockChannel):  # type: ignore[misc]  # Any as a base, see above
    """The half of a channel that consumes."""

    connection: Any
    qos: Deliveries

    def __init__(self, connection: Any, *args: Any, **kwargs: Any) -> None:
        self.turns: Turns = connection.turns
        #: The last fetch found less than it asked for, and no wake has come since.
        self._idle = False
        self._asked = 0
        #: What a fetch may ask for, as far as the time goes that delivering it takes.
        self._pace = 1
        self._without_ack: set[str] = set()
        super().__init__(connection, *args, **kwargs)

    # Keys, complete as scripts need them

    @property
    def delivery_keys(self) -> tuple[str, str]:
        """The hash of deliveries and its index by time."""
        prefix = self.global_keyprefix
        return f"{prefix}{self.unacked_key}", f"{prefix}{self.unacked_index_key}"

    def wake_key(self, queue: str) -> str:
        """What idle consumers of a queue wait on."""
        return f"{self.global_keyprefix}llmtasks.wake.{queue}"

    def queue_of(self, key: str) -> str:
        """The queue whose messages of one priority are at ``key``."""
        return key.removeprefix(self.global_keyprefix).rsplit(self.sep, 1)[0]

    # Consumers

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        """Consume from a queue."""
        result = super().basic_consume(queue, no_ack, *args, **kwargs)
        (self._without_ack.add if no_ack else self._without_ack.discard)(queue)
        if not no_ack and queue not in self.active_fanout_queues:
            self.qos.look_after()
        return result

    def _basic_cancel(self, consumer_tag: str) -> Any:
        result = super()._basic_cancel(consumer_tag)
        if self._in_poll and self._asked and not self.active_queues:
            # Celery does not come here again when it shuts down, and may then wait for its runs for long.
            with suppress(Empty, *self.connection_errors):
                if self._in_poll.can_read(timeout=1):
                    self._brpop_read()
        return result

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """Fetch one message; None where there is none."""
        with self.conn_or_acquire() as client:
            reply = client.execute_command(*self._fetch_command([queue], 1))
            self._maybe_update_queues_expire(client, queue)
        for _, payload in self._readable(reply):
            message = self.Message(payload, channel=self)
            if no_ack:
                self.qos.settle(message.delivery_tag)
            else:
                self.qos.append(message, message.delivery_tag)
            return message
        return None

    # kombu's event loop and its blocking loop alike call the next two (redis.py:720, :1459): one sends a command, the
    # other reads the reply when there is one. Names and state are those of stock's BRPOP.

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for messages; where the last such question found too few, for a wake."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        if self._idle:
            self._asked = 0
            command = ["BZPOPMIN", *map(self.wake_key, queues), timeout or self.brpop_timeout]
        else:
            self._asked = self._how_many()
            command = self._fetch_command(queues, self._asked)
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self._in_poll.send_command(*command)

    def _how_many(self) -> int:
        """As many as there is room for; without an event loop one, for that is what ``drain_events`` delivers."""
        room = self.qos.room()
        most = self._pace if self.turns.go_on else 1
        return most if room is None else max(1, min(room, most))

    def _fetch_command(self, queues: list[str], count: int) -> list[Any]:
        keys = [
            *self.delivery_keys,
            *map(self.wake_key, queues),
            *(
                f"{self.global_keyprefix}{self._q_for_pri(queue, step)}"
                for step in self.priority_steps
                for queue in queues
            ),
        ]
        in_turns = int(not isinstance(self._queue_cycle, priority_cycle))
        return ["EVAL", scripts.FETCH, len(keys), *keys, len(queues), count, BATCH_BYTES, uuid(), in_turns]

    def _brpop_read(self, **options: Any) -> bool:
        """Deliver what came, if these were messages."""
        messages = [*self._readable(self._read_reply(**options))]
        if messages and monotonic() - self._brpop_sent_at > self.visibility_timeout / 2:
            ours = self.qos.claim([tag_of(payload) for _, payload in messages])
            messages = [message for message in messages if tag_of(message[1]) in ours]
        room = self.qos.room()
        if room is not None and len(messages) > room:  # it was lowered since they were asked for
            self.qos.give_back([tag_of(payload) for _, payload in messages[room:]])
            messages = messages[:room]
        if not self._deliver_all(messages):
            raise Empty
        return True

    def _deliver_all(self, messages: Sequence[tuple[str, Any]]) -> int:
        """Deliver these messages, and give back those that nobody wants; how many were wanted."""
        waiting, unwanted, delivered = deque(messages), list[str](), 0
        for _, payload in messages:
            self.qos.hold(tag_of(payload), payload)
        began = monotonic()
        try:
            while waiting:
                queue, payload = waiting.popleft()
                tag = tag_of(payload)
                if not self.qos.holds(tag):  # a callback closed the channel
                    continue
                if queue not in self._active_queues:  # cancelled since it was asked for
                    unwanted.append(tag)
                    continue
                if queue in self._without_ack:
                    self.qos.settle(tag)
                    self.qos.let_go(tag)
                self._queue_cycle.rotate(queue)
                delivered += 1
                self.connection._deliver(payload, queue)
        finally:
            unwanted += [tag_of(payload) for _, payload in waiting]
            unwanted = [tag for tag in unwanted if self.qos.holds(tag)]
            if unwanted:
                self.qos.give_back(unwanted)
        if delivered:
            each = (monotonic() - began) / delivered
            self._pace = max(1, min(BATCH, 2 * self._pace, int(BATCH_SECONDS / max(each, 1e-6))))
        return delivered

    def _read_reply(self, **options: Any) -> list[Any]:
        """What a fetch took; nothing after a wake."""
        asked, self._asked, self._idle = self._asked, 0, False
        connection = self.client.connection
        try:
            reply = self.client.parse_response(connection, "EVAL" if asked else "BZPOPMIN", **options)
        except self.connection_errors:
            connection.disconnect()  # the loop connects again
            raise
        finally:
            self._in_poll = None
            # The one moment in which stock, too, may send a rotated credential here (redis.py:1500).
            self._flush_brpop_reauth()
        if not asked:
            return []
        self._idle = len(reply) < asked * 3
        return list(reply)

    def _readable(self, reply: list[Any]) -> Iterator[tuple[str, Any]]:
        """The queue and the payload of each message in a fetch's reply; what is none of kombu's is set aside."""
        for key, tag, text in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
            queue, delivery_tag = self.queue_of(bytes_to_str(key)), bytes_to_str(tag)
            try:
                payload = loads(bytes_to_str(text))
                payload["properties"]["delivery_tag"] = delivery_tag
                count_delivery(payload)
            except (ValueError, TypeError, KeyError) as error:
                logger.error(
                    "a message in queue %r is not one of kombu's (%s): expected JSON with properties; "
                    "it is set aside in the list %s: %.200r",
                    queue,
                    error,
                    UNREADABLE,
                    text,
                )
                with self.conn_or_acquire() as client:
                    self.qos.set_aside(client, delivery_tag, f"{self.global_keyprefix}{UNREADABLE}")
            else:
                yield queue, payload

    def close(self) -> None:
        """Give back what is held, and what an unanswered fetch brings; without the server it comes back by itself."""
        if self._in_poll and self._asked:
            with suppress(*self.connection_errors):
                self.qos.give_back([bytes_to_str(tag) for tag in self._read_reply()[1::3]])
        self._in_poll = None  # kombu would wait for a wake here
        super().close()


def tag_of(payload: Any) -> str:
    """The delivery tag of a message that was fetched."""
    return str(payload["properties"]["delivery_tag"])
