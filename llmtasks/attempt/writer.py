"""Writer: the claims and ends of a loop's many coroutines, written in groups.

An attempt does not start before its claim is committed, and its message is not acknowledged before its end is.
"""

from __future__ import annotations

import asyncio
import threading
from datetime import datetime
from typing import Any, Final, TypeAlias

from llmtasks.bridge import Gathering, Wish
from llmtasks.dispatch import Station
from llmtasks.holding import persist
from llmtasks.store import groups
from llmtasks.store.claims import Claim, Offer
from llmtasks.store.ends import End

#: Claims and ends that share a transaction at most: what waits for the slowest of them.
GROUP: Final = 200

_Asked: TypeAlias = Offer | tuple[Claim, End]


class Writer(Gathering[_Asked]):
    """The thread that writes for one station."""

    def __init__(self, at: Station) -> None:
        self._at = at
        super().__init__("llmtasks-writer", GROUP)

    def claim(self, offer: Offer) -> asyncio.Future[Claim | None]:
        """Take a run that needs no slot: the claim once it is committed, None as ``groups.claim_slotless``."""
        return self.ask(offer)

    def end(self, claim: Claim, how: End) -> asyncio.Future[bool]:
        """End an attempt that is lone: once it is committed, whether the run was still ours."""
        return self.ask((claim, how))

    def key(self, asked: _Asked) -> str:
        """Copies of a message are claimed one after the other."""
        return asked.id if isinstance(asked, Offer) else asked[0].id

    def fulfil(self, group: list[Wish[_Asked]]) -> None:
        """Write a group; where something in it cannot be written, each by itself: the others must not suffer for it."""
        try:
            persist(lambda: self._write(group))
        except Exception:
            for wish in group:
                try:
                    persist(lambda: self._write([wish]))  # noqa: B023 - called at once
                except Exception as error:
                    wish.error = error

    def _write(self, group: list[Wish[_Asked]]) -> None:
        now = self._at.database.now()
        with self._at.database.transaction() as tx:
            self._claim(tx, [wish for wish in group if isinstance(wish.asked, Offer)], now)
            self._end(tx, [wish for wish in group if not isinstance(wish.asked, Offer)], now)

    def _claim(self, tx: Any, wishes: list[Wish[Any]], now: datetime) -> None:
        if wishes:
            silent_since = now - self._at.settings.lease_time
            claims = groups.claim_slotless(tx, [wish.asked for wish in wishes], now, silent_since)
            for wish, claim in zip(wishes, claims, strict=True):
                wish.answer = claim

    def _end(self, tx: Any, wishes: list[Wish[Any]], now: datetime) -> None:
        if wishes:
            for wish, ours in zip(wishes, groups.end(tx, [wish.asked for wish in wishes], now), strict=True):
                wish.answer = ours


_writers: Final[dict[Station, Writer]] = {}
_making: Final = threading.Lock()


def writer_for(at: Station) -> Writer:
    """The writer of a station, whose thread lives as long as the process."""
    found = _writers.get(at)
    if found is None:
        with _making:
            found = _writers.get(at)
            if found is None:
                found = _writers[at] = Writer(at)
    return found
