"""What this process knows of paused functions, so that a claim need not ask the database.

The worker's main process reads the pauses every ``cancel_poll`` seconds. Its children are told by a number in memory
that they share with it: it grows whenever something was paused or resumed, and only then a child reads them too.
"""

from __future__ import annotations

import mmap
import threading
from typing import Final

from llmtasks.dispatch import Station
from llmtasks.holding import persist
from llmtasks.states import PauseKind
from llmtasks.store import pauses
from llmtasks.store.pauses import Pause

#: Bytes of the shared number.
_WIDTH: Final = 8


class KnownPauses:
    """The paused functions of this process's apps."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, _WIDTH)  # made before any fork
        self._lock = threading.Lock()
        self._seen = 0
        self._functions: dict[str, frozenset[str]] = {}

    def refresh(self, at: Station) -> list[Pause]:
        """Read what is paused, and let the children know where that has changed; for the main process.

        Raises:
            DatabaseUnavailableError: The database does not answer; what is known stays.
        """
        with at.database.reading() as connection:
            found = pauses.find(connection, at.name)
        functions = _functions_of(found)
        with self._lock:
            if self._functions.get(at.name) != functions:
                self._functions[at.name] = functions
                self._seen += 1
                self._shared[:] = self._seen.to_bytes(_WIDTH)
        return found

    def may_hold_up(self, at: Station, func_name: str) -> bool:
        """Whether a function may be paused: then the claim asks the database, which knows."""
        number = int.from_bytes(self._shared[:])
        if number == 0:
            return True  # nobody has read them yet
        if number > self._seen:
            persist(lambda: self._read(at, number))
        return func_name in self._functions.get(at.name, ())

    def _read(self, at: Station, number: int) -> None:
        with at.database.reading() as connection:
            found = pauses.find(connection, at.name)
        with self._lock:
            self._functions[at.name] = _functions_of(found)
            self._seen = max(self._seen, number)


def _functions_of(found: list[Pause]) -> frozenset[str]:
    return frozenset(pause.name for pause in found if pause.kind is PauseKind.FUNCTION)


known_pauses: Final = KnownPauses()
