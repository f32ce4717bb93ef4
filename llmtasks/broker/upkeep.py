"""The thread beside a consumer: stamps what it holds, and restores what nobody stamps."""

from __future__ import annotations

import logging
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import redis
from kombu.transport import redis as stock

from llmtasks.broker import scripts
from llmtasks.redis_options import STOCK_VISIBILITY

if TYPE_CHECKING:
    from llmtasks.broker.deliveries import Deliveries

logger = logging.getLogger(__name__)

#: Seconds between two stamps, and between two looks for what nobody stamps; less where the visibility is short.
TICK: Final = 1.0
#: Stamps that may fail or be late before a delivery counts as lost.
SPARE_TICKS: Final = 4
#: Deliveries that one call of a script stamps or finds.
SLICE: Final = 500
#: Seconds to wait for an answer: a connection that is half dead must not hold up the stamps.
PATIENCE: Final = 5.0
#: Ticks between two looks for what killed stock consumers left under stock's keys.
STOCK_TICKS: Final = 60

# kombu has no types of its own.
_StockQoS: Any = stock.QoS


class Upkeep(threading.Thread):
    """Looks after one channel's deliveries until it is closed and all of them are settled.

    A thread, because Celery's event loop stands still in a long call and ends before a warm shutdown has waited for its
    runs; with connections of its own, which outlive the channel's.

    Whoever could not reach the server for a while, or has just started, restores nothing for one visibility: the owners
    may not have reached it either. That goes by the server's clock, for which a suspended machine is such a while.
    """

    def __init__(self, deliveries: Deliveries) -> None:
        super().__init__(name="llmtasks-deliveries", daemon=True)
        channel: Any = deliveries.channel
        self._deliveries = deliveries
        self._age = float(deliveries.visibility_timeout)
        self._index, self._keys = channel.delivery_keys[1], channel.delivery_keys
        self._errors = channel.connection_errors
        address: Any = {**channel.address(), "socket_timeout": min(channel.socket_timeout or PATIENCE, PATIENCE)}
        self._pool = redis.ConnectionPool(**address)
        self._client = channel.Client(connection_pool=self._pool)
        self._stock: Any = _StockQoS(channel)
        self._stock.unacked_key, self._stock.unacked_index_key = channel.stock_keys
        self._stock.visibility_timeout = max(STOCK_VISIBILITY, self._age)
        self._ticks = 0
        self._answered: float | None = None
        self._since = 0.0
        self._stirred = threading.Event()

    def stir(self) -> None:
        """Let the thread see at once that its channel is closed."""
        self._stirred.set()

    def run(self) -> None:
        """Tick until there is nothing left to look after."""
        every = min(TICK, self._age / SPARE_TICKS)
        complained = False
        while not self._deliveries.closed or self._deliveries.held or self._deliveries.owed:
            try:
                self._tick()
                complained = False
            except self._errors as error:
                logger.debug("deliveries are not stamped while the broker is away: %s", error)
            except Exception:
                if not complained:
                    logger.exception("deliveries cannot be stamped, tried again")
                complained = True
            self._stirred.wait(every)
            self._stirred.clear()
        self._pool.disconnect()

    def _tick(self) -> None:
        self._deliveries.pay(self._client)
        now = self._stamp()
        if self._answered is None or not 0 <= now - self._answered <= self._age / 2:
            self._since = now
        self._answered = now
        if now - self._since >= self._age and not self._deliveries.closed:
            self._restore_overdue()
            if self._ticks % STOCK_TICKS == 0:
                self._stock.restore_visible(num=SLICE, interval=1)
            self._ticks += 1

    def _stamp(self) -> float:
        held = self._deliveries.held
        now = 0.0
        for start in range(0, max(1, len(held)), SLICE):
            now = float(self._client.eval(scripts.STAMP, 1, self._index, *held[start : start + SLICE]))
        return now

    def _restore_overdue(self) -> None:
        restored, began = 0, monotonic()
        while monotonic() - began < TICK:  # the next stamps must not be late
            found = self._client.eval(scripts.OVERDUE, 2, *self._keys, self._age, SLICE)
            # Each goes before those that are already there, hence the youngest first.
            each = [(tag.decode(), kept) for tag, kept in zip(found[::2], found[1::2], strict=True)]
            restored += self._deliveries.restore(self._client, each, age=self._age, counts=True)
            if len(found) < 2 * SLICE:
                break
        if restored:
            logger.warning("%d messages that dead workers had fetched are back in their queues", restored)
