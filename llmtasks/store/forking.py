"""Forking beside threads: no fork while a thread of ours talks to a server, so that no child inherits its locks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

#: Seconds a fork waits for transactions in other threads before it goes ahead all the same.
FORK_PATIENCE: Final = 10.0


class ForkGate:
    """Lets many threads in at once, but none while the process forks.

    A child inherits every lock in the state it had; one held by a thread that does not exist there is never released.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside: dict[int, int] = {}
        #: How many threads fork now.
        self._closed = 0
        os.register_at_fork(before=self._close, after_in_parent=self._open, after_in_child=self._reset)

    @contextmanager
    def entered(self) -> Generator[None]:
        """Stay inside; a fork in another thread waits until the block is left."""
        me = threading.get_ident()
        with self._condition:
            while self._closed and me not in self._inside:
                self._condition.wait()
            self._inside[me] = self._inside.get(me, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._inside[me] = self._inside.get(me, 1) - 1
                if self._inside[me] <= 0:
                    self._inside.pop(me, None)
                    self._condition.notify_all()

    def _close(self) -> None:
        deadline = time.monotonic() + FORK_PATIENCE
        with self._condition:
            self._closed += 1
            while set(self._inside) - {threading.get_ident()}:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._condition.wait(remaining):
                    break

    def _open(self) -> None:
        with self._condition:
            self._closed -= 1
            self._condition.notify_all()

    def _reset(self) -> None:
        self._condition = threading.Condition()
        self._inside = {}
        self._closed = 0


#: Shared by everything in this process that talks to a server from a thread of ours.
fork_gate: Final = ForkGate()
