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
- On kombu's event loop a fetch brings as many messages as the prefetch has room for (`llmtasks.broker.fetching`), and
  what is acknowledged in one turn of the loop goes in one command before the loop sleeps (`llmtasks.broker.turns`). A
  worker that is killed in between leaves messages that it had done, and they are delivered again, as after a kill just
  before. ``drain_events`` fetches and delivers one message, and there each is acknowledged at once.
- Each delivery says how often its message was delivered: ``delivery_info["delivery_count"]``, 1 for the first. It
  counts deliveries that were rejected back into the queue or whose holder died, not what a consumer gives back when it
  ends.
- The client is reused. A channel remembers its server's address when it is closed, so that what is acknowledged after
  a broken connection reaches it (stock ends the worker: redis.py:1959).

Celery apps choose it by the transport option ``redis_transport``, see ``llmtasks.redis_options``; the others get stock
from the same class. URLs beginning with ``llmtasks+`` always mean this one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

from kombu import Connection
from kombu.transport import redis as stock

from llmtasks.broker import scripts
from llmtasks.broker.deliveries import Deliveries
from llmtasks.broker.fetching import Fetching
from llmtasks.broker.gathering import Command, Commands, Gathering, PublishBatch
from llmtasks.broker.turns import Turns
from llmtasks.errors import InvalidOptionError
from llmtasks.redis_options import EXPLICIT, PRIORITY_STEPS, VISIBILITY

#: Seconds after which an idle consumer looks without having been woken.
POLL: Final = 0.2

# kombu has no types of its own.
_StockTransport: Any = stock.Transport


class Channel(Fetching):
    """A channel that fetches without loss."""

    unacked_key: str
    unacked_index_key: str

    QoS = Deliveries
    priority_steps = PRIORITY_STEPS
    visibility_timeout = VISIBILITY

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._address: dict[bool, dict[str, Any]] = {}  # for kombu's ``asynchronous``
        self._reused: Any = None
        self._noted: Commands | None = None
        super().__init__(*args, **kwargs)
        self.stock_keys = (self.unacked_key, self.unacked_index_key)
        # Instance attributes: the deliveries read them from here (redis.py:564).
        self.unacked_key, self.unacked_index_key = (f"llmtasks.{key}" for key in self.stock_keys)

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

    @contextmanager
    def noting(self) -> Generator[list[Command]]:
        """What is published inside is not sent; the list tells the commands that would do it."""
        before, self._noted = self._noted, Commands()
        try:
            yield self._noted
        finally:
            self._noted = before

    def note(self, commands: Iterable[Command]) -> None:
        """Put commands beside those of what is published."""
        assert self._noted is not None
        self._noted += commands

    def do(self, commands: Iterable[Command]) -> None:
        """Send what was noted, in one round trip, all messages of a queue by one command."""
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            gathered = Gathering(pipe)
            for name, *arguments in commands:
                getattr(gathered, name)(*arguments)
            gathered.execute()

    def basic_publish(self, message: Any, exchange: str, routing_key: str, **kwargs: Any) -> Any:
        """Publish a message, or note how."""
        if self._noted is not None:
            kwargs["_publish_batch"] = self._noted
        return super().basic_publish(message, exchange, routing_key, **kwargs)

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        """Put a message into its queue and wake a consumer; where and for how long is kombu's decision."""
        batch = kwargs.pop("_publish_batch", None)
        commands = Commands()
        super()._put(queue, message, _publish_batch=commands, **kwargs)
        if batch is not None:
            for name, *args in self._with_wake(queue, commands):
                batch.add(name, *args)
            return
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for name, *args in self._with_wake(queue, commands):
                getattr(pipe, name)(*args)
            pipe.execute()

    def _with_wake(self, queue: str, commands: Commands) -> Iterator[Command]:
        for name, *args in commands:
            if name == "lpush":
                key, text = args
                yield "eval", scripts.PUT, 2, f"{self.global_keyprefix}{key}", self.wake_key(queue), text
            else:
                yield name, *args


class Transport(_StockTransport):  # type: ignore[misc]  # Any as a base, see above
    """Stock kombu's transport, with this module's channel where that is chosen."""

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self.turns = Turns(self)
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

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Fetch and acknowledge in the turns of kombu's event loop."""
        super().register_with_event_loop(connection, loop)
        if self.Channel is Channel:
            self.turns.follow(loop)
