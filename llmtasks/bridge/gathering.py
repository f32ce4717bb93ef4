"""Gathering: what a loop's many coroutines want done, done for all of them in one go by a thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, Self, TypeVar, cast

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Wish(Generic[T]):
    """Something that somebody waits for, and what came of it: an answer or an error."""

    asked: T
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    answer: Any = None
    error: Exception | None = None

    def tell(self) -> None:
        """Let it be known; called in the loop's thread."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.answer)


class Gathering(Generic[T]):
    """A thread that does in one go what gathered while it was busy; nobody waits for a timer.

    Args:
        of: Whose wishes it fulfils.
    """

    #: The thread's name.
    name: ClassVar[str]
    #: How many wishes are fulfilled in one go at most: what waits for the slowest of them.
    most: ClassVar[int] = 200

    def __init__(self, of: Any) -> None:
        self.of = of
        self._wishes: deque[Wish[T]] = deque()
        self._stirred = threading.Event()
        threading.Thread(target=self._work, name=self.name, daemon=True).start()

    @classmethod
    def at(cls, of: Hashable) -> Self:
        """The one whose wishes these are; its thread lives as long as the process."""
        found = _gatherings.get((cls, of))
        if found is None:
            with _making:
                found = _gatherings.get((cls, of))
                if found is None:
                    found = _gatherings[cls, of] = cls(of)
        return cast("Self", found)

    def fulfil(self, group: list[Wish[T]]) -> None:
        """Set the answers of a group; what this raises is each one's error. Called in the thread."""
        raise NotImplementedError

    def key(self, _asked: T) -> Hashable | None:
        """What may be in a group only once; None where that does not matter."""
        return None

    def ask(self, asked: T) -> asyncio.Future[Any]:
        """A future of the running loop for the answer."""
        loop = asyncio.get_running_loop()
        wish = Wish(asked, loop, loop.create_future())
        self._wishes.append(wish)
        if not self._stirred.is_set():
            self._stirred.set()
        return wish.future

    def _work(self) -> None:
        while True:
            self._stirred.wait()
            self._stirred.clear()
            while group := self._next_group():
                try:
                    self.fulfil(group)
                except Exception as error:
                    for wish in group:
                        wish.error = error
                for loop in {wish.loop for wish in group}:
                    _tell(loop, [wish for wish in group if wish.loop is loop])

    def _next_group(self) -> list[Wish[T]]:
        group: list[Wish[T]] = []
        keys: set[Hashable] = set()
        while self._wishes and len(group) < self.most:
            key = self.key(self._wishes[0].asked)
            if key in keys:
                break
            if key is not None:
                keys.add(key)
            group.append(self._wishes.popleft())
        return group


_gatherings: Final[dict[tuple[type[Any], Hashable], Gathering[Any]]] = {}
_making: Final = threading.Lock()


def _tell(loop: asyncio.AbstractEventLoop, wishes: list[Wish[Any]]) -> None:
    def tell() -> None:
        for wish in wishes:
            wish.tell()

    try:
        loop.call_soon_threadsafe(tell)
    except RuntimeError:  # it was closed, and with it all that waited
        logger.debug("nobody waits for %d answers any more", len(wishes))
