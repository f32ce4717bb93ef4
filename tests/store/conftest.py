"""One database for each test of the store, on SQLite and on PostgreSQL alike."""

from collections.abc import Iterator

import pytest

from llmtasks.store.database import Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database with llmtasks' tables."""
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()
