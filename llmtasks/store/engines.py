"""Engines: how each kind of database is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event

from llmtasks.errors import ConfigurationError
from llmtasks.store.pinging import ping_idle

#: Seconds a SQLite writer waits for another one; 5 s, sqlite3's default, lost results under load.
SQLITE_BUSY_TIMEOUT: Final = 30.0
#: Seconds a connection attempt to a server may take.
CONNECT_TIMEOUT: Final = 5


def make_engine(url: URL) -> Engine:
    """An engine for a database; nothing is opened before its first use.

    Raises:
        ConfigurationError: The database's driver is not installed.
    """
    sqlite = url.get_backend_name() == "sqlite"
    arguments: dict[str, Any]
    if sqlite:
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
        arguments = {"timeout": SQLITE_BUSY_TIMEOUT, "check_same_thread": False, "isolation_level": None}
    else:
        arguments = {"connect_timeout": CONNECT_TIMEOUT}
    try:
        engine = create_engine(url, connect_args=arguments, pool_size=5, max_overflow=50)
    except ImportError as error:
        raise ConfigurationError(
            f"database {url.render_as_string()!r}: its driver is missing ({error}); "
            f"install llmtasks[{url.get_backend_name()}]"
        ) from error
    if sqlite:
        event.listen(engine, "connect", _tune_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        ping_idle(engine)
    return engine


def _tune_sqlite(connection: Any, _record: object) -> None:
    # WAL with NORMAL survives the death of any process; only a power cut may take the last transactions.
    connection.execute("PRAGMA synchronous=NORMAL")


def use_wal(engine: Engine) -> None:
    """Readers never wait for writers, and a commit does not wait for the disk; the file keeps the mode."""
    with engine.connect() as connection:
        connection.rollback()  # no mode changes inside a transaction
        raw = connection.connection.dbapi_connection
        assert raw is not None
        raw.cursor().execute("PRAGMA journal_mode=WAL")


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that turns into a writer fails at once with "database is locked" instead of waiting.
    raw = connection.connection.dbapi_connection
    assert raw is not None
    # Past SQLAlchemy, which takes 15 us to execute it; _unavailable knows the driver's own error.
    raw.cursor().execute("BEGIN IMMEDIATE" if connection.get_execution_options().get("write") else "BEGIN")
