"""The event loops of this process."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import Final

logger = logging.getLogger(__name__)


class Loops:
    """One loop that the main thread runs while a body does, and one in a thread of its own."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the loops; a forked child makes its own."""
        self._lock = threading.Lock()
        self._own: asyncio.AbstractEventLoop | None = None
        self._shared: asyncio.AbstractEventLoop | None = None

    def own(self) -> asyncio.AbstractEventLoop:
        """The main thread's loop, which runs only while a body does."""
        if self._own is None or self._own.is_closed():
            self._own = asyncio.new_event_loop()
        return self._own

    def shared(self) -> asyncio.AbstractEventLoop:
        """The loop of all other threads, running in a thread of its own until it is stopped."""
        with self._lock:
            if self._shared is None or self._shared.is_closed():
                loop = self._shared = _new_loop()
                threading.Thread(target=_run_for_good, args=(loop,), name="llmtasks-loop", daemon=True).start()
            return self._shared


def _new_loop() -> asyncio.AbstractEventLoop:
    """The quicker loop where that is installed."""
    try:
        import uvloop  # pyright: ignore[reportMissingImports]
    except ImportError:
        return asyncio.new_event_loop()
    made: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return made


def _run_for_good(loop: asyncio.AbstractEventLoop) -> None:
    """Run the shared loop, also after a ``sys.exit()`` in some task that a body left behind: others wait on it."""
    while True:
        try:
            loop.run_forever()
        except BaseException:
            logger.exception("something ended the loop of this process's coroutines; it goes on")
        else:
            return


loops: Final = Loops()
os.register_at_fork(after_in_child=loops.reset)
