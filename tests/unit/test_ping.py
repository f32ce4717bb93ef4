"""Beat's mailbox: an outage is said once, its return each time."""

import logging

import pytest

from llmtasks.beat.ping import QuietMailbox


def test_outage_is_said_once_and_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """Celery says each try to reconnect, with traceback; after a return the next outage is said again."""
    logger = logging.getLogger("tests.mailbox")
    quiet = QuietMailbox()
    logger.addFilter(quiet)

    with caplog.at_level(logging.INFO, logger.name):
        for _ in range(2):
            try:
                raise ConnectionError("gone")
            except ConnectionError as error:
                logger.error("beat pidbox connection error: %r", error, exc_info=True)
            for seconds in (2, 4, 6):
                logger.error("beat pidbox: Connection error: %s. Trying again in %s seconds...", "refused", seconds)
            logger.info("beat pidbox: Connected to %s.", "redis://")
        logger.info("beat: Starting...")

    logger.removeFilter(quiet)
    outage = ["beat pidbox connection error: ConnectionError('gone')", "beat pidbox: Connected to redis://."]
    assert caplog.messages == [*outage, *outage, "beat: Starting..."]
    assert all(record.exc_info is None for record in caplog.records)
