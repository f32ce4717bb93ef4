"""Deadlines: time limits of thousands of coroutines, nearly all of which end long before.

An event loop keeps its timers in a heap and takes cancelled ones out late: with limits of an hour that was a fifteenth
of what a run costs. Long limits are looked at once a second instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

#: Limits from here on are looked at once in `TICK`, and are exceeded by up to that.
LONG: Final = 30.0
#: Seconds.
TICK: Final = 1.0


class Deadline(Protocol):
    """A time limit that has not passed."""

    def cancel(self) -> None:
        """Do nothing when it passes."""
        ...


class _Long:
    __slots__ = ("_watch", "at", "call")

    def __init__(self, at: float, call: Callable[[], Any], watch: _Watch) -> None:
        self.at = at
        self.call = call
        self._watch = watch

    def cancel(self) -> None:
        self._watch.deadlines.discard(self)


class _Watch:
    """The long limits of one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_later = loop.call_later
        self._time = loop.time
        self._ticks = False
        self.deadlines: set[_Long] = set()

    def add(self, seconds: float, call: Callable[[], Any]) -> _Long:
        deadline = _Long(self._time() + seconds, call, self)
        self.deadlines.add(deadline)
        if not self._ticks:
            self._ticks = True
            self._call_later(TICK, self._tick)
        return deadline

    def _tick(self) -> None:
        now = self._time()
        for deadline in [deadline for deadline in self.deadlines if deadline.at <= now]:
            self.deadlines.discard(deadline)
            deadline.call()
        self._ticks = bool(self.deadlines)
        if self._ticks:
            self._call_later(TICK, self._tick)


_watches: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch]] = WeakKeyDictionary()


def call_at_deadline(loop: asyncio.AbstractEventLoop, seconds: float, call: Callable[[], Any]) -> Deadline:
    """Call something when ``seconds`` have passed, up to a second later where they are many; in the loop's thread."""
    if seconds < LONG:
        return loop.call_later(seconds, call)
    watch = _watches.get(loop)
    if watch is None:
        watch = _watches[loop] = _Watch(loop)
    return watch.add(seconds, call)
