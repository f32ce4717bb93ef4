"""Giving up runs that this process holds, so that others can have them."""

from __future__ import annotations

import logging
from datetime import timedelta

from llmtasks.dispatch import Station, relay, send
from llmtasks.errors import LLMTasksError
from llmtasks.owner import owner_of
from llmtasks.store import outbox, rescue

logger = logging.getLogger(__name__)


def put_back(at: Station, run_id: str) -> None:
    """Release a run of this process, uncounted, and owe the broker a new message.

    The old one may be acknowledged or not, a copy does no harm.
    """
    now = at.database.now()
    try:
        with at.database.transaction() as tx:
            released, handed = rescue.release(tx, owner_of(), run_id, now)
            until = now + timedelta(seconds=at.settings.outbox_patience)
            messages = outbox.requeue(tx, at.name, run_id, now, until) if released else []
        send(at, messages)
        relay(at, handed)
    except LLMTasksError as away:
        logger.warning("run %s cannot be put back, its lease ends it: %s", run_id, away)
