"""Message: what the outbox owes to the broker. The store makes it, the sender publishes it; neither knows the other."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

#: The kinds of a message: it starts an attempt, or it only has an end told.
RUN: Final = "run"
DELIVER: Final = "deliver"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What the sender needs to publish a run; the texts are JSON."""

    run_id: str
    kind: str
    app: str
    func_name: str
    args: str | None
    kwargs: str | None
    #: None where only ``replacement`` says what to send.
    envelope: str | None
    queue: str | None
    priority: int
    #: Attempts already ended: Celery's ``retries``.
    attempts: int
    replacement: str | None
    schedule_id: str | None
    #: Until then nobody else sends it; what was put into the outbox again meanwhile has another time.
    reserved_until: datetime

    @property
    def delivers(self) -> bool:
        """Whether the message only tells Celery an end that is in the ledger."""
        return self.kind == DELIVER
