"""Celery's mailbox, through which ``celery inspect ping`` reaches beat, without its lines during an outage."""

from __future__ import annotations

import logging
from typing import Final

#: How the lines of ``celery.beat.BeatPidbox`` begin.
_CONNECTED: Final = "beat pidbox: Connected"
_LOST: Final = "beat pidbox connection error"
_RETRIES: Final = "beat pidbox: Connection error"


class QuietMailbox(logging.Filter):
    """Says an outage of the broker once, without a traceback: the scheduler says what it means for beat."""

    def __init__(self) -> None:
        super().__init__()
        self._away = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is to be logged."""
        line = str(record.msg)
        if line.startswith(_CONNECTED):
            self._away = False
        elif line.startswith((_LOST, _RETRIES)):
            record.exc_info = record.exc_text = None
            said, self._away = self._away, True
            return not said
        return True


def be_quiet() -> None:
    """Let Celery's mailbox of beat say an outage once."""
    logger = logging.getLogger("celery.beat")
    if not any(isinstance(known, QuietMailbox) for known in logger.filters):
        logger.addFilter(QuietMailbox())
