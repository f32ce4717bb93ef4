"""Writer: the claims and ends of a loop's many coroutines, written in groups.

An attempt does not start before its claim is committed, and its message is not acknowledged before its end is.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any, TypeAlias

from llmtasks.bridge import Gathering, Wish
from llmtasks.dispatch import Station
from llmtasks.holding import persist
from llmtasks.store import groups
from llmtasks.store.claims import Claim, Offer
from llmtasks.store.ends import End

_Asked: TypeAlias = Offer | tuple[Claim, End]


class Writer(Gathering[_Asked]):
    """The thread that writes for one station."""

    name = "llmtasks-writer"
    of: Station

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
        now = self.of.database.now()
        with self.of.database.transaction() as tx:
            self._claim(tx, [wish for wish in group if isinstance(wish.asked, Offer)], now)
            self._end(tx, [wish for wish in group if not isinstance(wish.asked, Offer)], now)

    def _claim(self, tx: Any, wishes: list[Wish[Any]], now: datetime) -> None:
        if wishes:
            silent_since = now - self.of.settings.lease_time
            claims = groups.claim_slotless(tx, [wish.asked for wish in wishes], now, silent_since)
            for wish, claim in zip(wishes, claims, strict=True):
                wish.answer = claim

    def _end(self, tx: Any, wishes: list[Wish[Any]], now: datetime) -> None:
        if wishes:
            for wish, ours in zip(wishes, groups.end(tx, [wish.asked for wish in wishes], now), strict=True):
                wish.answer = ours
