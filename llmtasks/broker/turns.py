"""The turns of kombu's event loop, in which acknowledgements gather."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Turns:
    """The turns of the event loop that drives one transport, once there is one.

    Each turn ends with waiting for something to happen. Before that, what gathered is sent.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._hub: Any = None
        self._thread: int | None = None

    @property
    def go_on(self) -> bool:
        """Whether the loop runs, as far as can be known: it says when it begins a turn and when it is closed."""
        return self._thread is not None

    def follow(self, hub: Any) -> None:
        """Take part in the turns of a loop, from its next one to its end."""
        self._hub = hub
        hub.on_tick.add(self._tick)
        hub.on_close.add(self._end)

    def gathers(self, send: Callable[[], object]) -> bool:
        """Whether ``send`` will be called in this turn; another thread's call wakes the loop for that.

        Within the loop's own thread only the end of the turn is early enough: what it gives to ``Hub.call_soon`` is
        called after the next wait (hub.py:316).
        """
        hub, thread = self._hub, self._thread
        if thread is None:
            return False
        if thread != threading.get_ident():
            hub.call_soon(send)
        return True

    def _tick(self) -> None:
        self._thread = threading.get_ident()
        self._send()

    def _send(self) -> None:
        for channel in tuple(self._transport.channels):
            deliveries = channel._qos  # not .qos, which would make one
            if deliveries is not None:
                deliveries.send()

    def _end(self, hub: Any) -> None:
        """No turn comes any more: what is acknowledged from now on is sent at once."""
        hub.on_tick.discard(self._tick)
        hub.on_close.discard(self._end)
        self._thread = self._hub = None
        self._send()
