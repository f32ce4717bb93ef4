"""A transport over kombu's for Redis and Valkey, which loses no message and gives back soon what a dead worker held.

The queues are kombu's own: same keys, same messages, so that stock producers and consumers and Flower work on them.
What differs from ``kombu.transport.redis`` (5.7):

- A message moves from its queue to what is unacknowledged in one step in the server (stock: BRPOP, then ZADD and HSET;
  a worker killed in between takes it along). An idle consumer does not wait on the queue, for that would take a message
  out, but on a wake key beside it, and then fetches. Producers of this transport set that key; for messages of stock
  producers it looks every `POLL` seconds. A wake that is lost costs that long, never a message.
- Whoever holds a message stamps it each second, and every consumer restores what nobody has stamped for 12 seconds, by
  the server's clock. These messages are under keys of their own, ``llmtasks.unacked`` and ``llmtasks.unacked_index``:
  a stock worker stamps once and may then hold a message for hours, which ours would take for lost. Each kind restores
  its own; ours also restore stock's after 12 hours, for there may be no stock worker any more.
- The client is reused. A channel remembers its server's address when it is closed, so that what is acknowledged after
  a broken connection reaches it (stock ends the worker: redis.py:1959).

Celery apps choose it by the transport option ``redis_transport``, see ``llmtasks.redis_options``; the others get stock
from the same class. URLs beginning with ``llmtasks+`` always mean this one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty
from time import monotonic
from types import SimpleNamespace
from typing import Any, Final

from kombu import Connection
from kombu.transport import redis as stock
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from kombu.utils.uuid import uuid

from llmtasks.broker import scripts
from llmtasks.broker.deliveries import Deliveries
from llmtasks.broker.gathering import PublishBatch
from llmtasks.errors import InvalidOptionError
from llmtasks.redis_options import EXPLICIT, PRIORITY_STEPS, VISIBILITY

logger = logging.getLogger(__name__)

#: Seconds after which an idle consumer looks without having been woken.
POLL: Final = 0.2
#: The list of messages that kombu could not read.
UNREADABLE: Final = "llmtasks.unreadable"

# kombu has no types of its own.
_StockChannel: Any = stock.Channel
_StockTransport: Any = stock.Transport


class Channel(_StockChannel):  # type: ignore[misc]  # Any as a base, see above
    """A channel that fetches without loss."""

    connection: Any
    unacked_key: str
    unacked_index_key: str

    QoS = Deliveries
    priority_steps = PRIORITY_STEPS
    visibility_timeout = VISIBILITY

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._address: dict[bool, dict[str, Any]] = {}  # for kombu's ``asynchronous``
        self._reused: Any = None
        #: The last fetch found nothing, and no wake has come since.
        self._idle = False
        self._without_ack: set[str] = set()
        super().__init__(*args, **kwargs)
        self.stock_keys = (self.unacked_key, self.unacked_index_key)
        # Instance attributes: the deliveries read them from here (redis.py:564).
        self.unacked_key, self.unacked_index_key = (f"llmtasks.{key}" for key in self.stock_keys)

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

    # The server

    def address(self) -> dict[str, Any]:
        """How to reach the server, also after the channel was closed."""
        return dict(self._connparams())

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        """What kombu makes of the connection's URL, remembered: closing takes the connection away (base.py:979)."""
        transport = self.connection
        if transport is not None and transport.client is not None:
            client = transport.client
            if client.uri_prefix == EXPLICIT and "://" in client.hostname:
                # kombu reads nothing of a URL behind a plus (connection.py:238), and its super() looks here.
                rest = Connection(client.hostname, ssl=client.ssl, credential_provider=client.credential_provider)
                self.connection = SimpleNamespace(client=rest, default_port=transport.default_port)
            try:
                self._address = {kind: super(Channel, self)._connparams(kind) for kind in (False, True)}
            finally:
                self.connection = transport
        return dict(self._address[asynchronous])

    def _create_client(self, asynchronous: bool = False) -> Any:
        """The one client of the pool: kombu makes one for each operation (redis.py:2085), a fifth of its time."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._reused is None or self._reused.connection_pool is not self.pool:
            self._reused = super()._create_client()
        return self._reused

    # Publishing

    def create_publish_batch(self, max_size: int) -> PublishBatch:
        """A batch that puts all messages of a queue by one command."""
        return PublishBatch(self, max_size)

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        """Put a message into its queue and wake a consumer; where and for how long is kombu's decision."""
        batch = kwargs.pop("_publish_batch", None)
        commands = _Commands()
        super()._put(queue, message, _publish_batch=commands, **kwargs)
        if batch is not None:
            for name, *args in self._with_wake(queue, commands):
                batch.add(name, *args)
            return
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for name, *args in self._with_wake(queue, commands):
                getattr(pipe, name)(*args)
            pipe.execute()

    def _with_wake(self, queue: str, commands: _Commands) -> Iterator[tuple[Any, ...]]:
        for name, *args in commands:
            if name == "lpush":
                key, text = args
                yield "eval", scripts.PUT, 2, f"{self.global_keyprefix}{key}", self.wake_key(queue), text
            else:
                yield name, *args

    # Fetching

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        """Consume from a queue."""
        result = super().basic_consume(queue, no_ack, *args, **kwargs)
        (self._without_ack.add if no_ack else self._without_ack.discard)(queue)
        if not no_ack and queue not in self.active_fanout_queues:
            self.qos.look_after()
        return result

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """Fetch one message; None where there is none."""
        with self.conn_or_acquire() as client:
            reply = client.execute_command(*self._fetch_command([queue]))
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
        """Ask for a message; where the last such question found none, for a wake."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        if self._idle:
            command = ["BZPOPMIN", *map(self.wake_key, queues), timeout or self.brpop_timeout]
        else:
            command = self._fetch_command(queues)
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self._in_poll.send_command(*command)

    def _brpop_read(self, **options: Any) -> bool:
        """Deliver what came, if it was a message."""
        delivered = False
        for queue, payload in self._readable(self._read_reply(**options)):
            if queue not in self._active_queues:  # cancelled since it was asked for
                self.qos.restore_by_tag(payload["properties"]["delivery_tag"])
                continue
            if queue in self._without_ack:
                self.qos.settle(payload["properties"]["delivery_tag"])
            self._queue_cycle.rotate(queue)
            self.connection._deliver(payload, queue)
            delivered = True
        if not delivered:
            raise Empty
        return True

    def _read_reply(self, **options: Any) -> list[Any]:
        """What a fetch took; nothing after a wake."""
        asked_for_wake, self._idle = self._idle, False
        connection = self.client.connection
        try:
            reply = self.client.parse_response(connection, "BZPOPMIN" if asked_for_wake else "EVAL", **options)
        except self.connection_errors:
            connection.disconnect()  # the loop connects again
            raise
        finally:
            self._in_poll = None
            # The one moment in which stock, too, may send a rotated credential here (redis.py:1500).
            self._flush_brpop_reauth()
        if asked_for_wake:
            return []
        self._idle = not reply
        return list(reply)

    def _fetch_command(self, queues: list[str]) -> list[Any]:
        keys = [
            *self.delivery_keys,
            *map(self.wake_key, queues),
            *(
                f"{self.global_keyprefix}{self._q_for_pri(queue, step)}"
                for step in self.priority_steps
                for queue in queues
            ),
        ]
        return ["EVAL", scripts.FETCH, len(keys), *keys, len(queues), uuid()]

    def _readable(self, reply: list[Any]) -> Iterator[tuple[str, Any]]:
        """The queue and the payload of each message in a fetch's reply; what is none of kombu's is set aside."""
        for key, tag, text in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
            queue, delivery_tag = self.queue_of(bytes_to_str(key)), bytes_to_str(tag)
            try:
                payload = loads(bytes_to_str(text))
                payload["properties"]["delivery_tag"] = delivery_tag
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
        if self._in_poll:
            with suppress(*self.connection_errors):
                for tag in self._read_reply()[1::3]:
                    self.qos.restore_by_tag(bytes_to_str(tag))
        super().close()


class _Commands(list[tuple[Any, ...]]):
    """What kombu takes for a batch: the commands that publish one message."""

    def add(self, *command: Any) -> None:
        self.append(command)


class Transport(_StockTransport):  # type: ignore[misc]  # Any as a base, see above
    """Stock kombu's transport, with this module's channel where that is chosen."""

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        explicit = str(client.transport_cls).startswith(EXPLICIT)
        options = client.transport_options
        chosen = explicit or options.get("redis_transport") == "llmtasks"
        # Without ack emulation there is nothing to hold: who says so wants stock's plain pop.
        if chosen and options.get("ack_emulation", True):
            seconds = options.get("visibility_timeout", VISIBILITY)
            if not isinstance(seconds, int | float) or seconds <= 0:
                raise InvalidOptionError("broker_transport_options['visibility_timeout']", seconds, "seconds above 0")
            self.Channel = Channel
            if self.polling_interval is None:
                self.brpop_timeout = POLL
