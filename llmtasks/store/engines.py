"""Engines: how each kind of database is opened."""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url

from llmtasks.errors import ConfigurationError
from llmtasks.store.dialects import MARIADB
from llmtasks.store.pinging import ping_idle

logger = logging.getLogger(__name__)

#: Seconds a SQLite writer waits for another one; 5 s, sqlite3's default, lost results under load.
SQLITE_BUSY_TIMEOUT: Final = 30.0
#: Milliseconds that one try to get SQLite's write lock takes, and after so many seconds, when it is no hurry any more.
SHORT_WAIT: Final = 2
LONG_WAIT: Final = 50
LONG_WAITED: Final = 1.0
_USUAL_WAIT: Final = f"PRAGMA busy_timeout={SQLITE_BUSY_TIMEOUT * 1000:.0f}"
#: Seconds a connection attempt to a server may take.
CONNECT_TIMEOUT: Final = 5
#: The first MariaDB that passes over locked rows.
OLDEST_MARIADB: Final = (10, 6)
#: Ways to write that a database is MariaDB and PyMySQL the driver.
_PYMYSQL: Final = frozenset({"mysql", "mariadb", "mysql+pymysql", "mariadb+pymysql"})


def database_url(url: str) -> URL:
    """``url`` with the driver that is used for it.

    Raises:
        ConfigurationError: No database that can keep the tables.
    """
    made = make_url(url)
    if made.drivername in _PYMYSQL:
        # By this name of the two SQLAlchemy takes MySQL as well, and asks the server which one it is.
        return made.set(drivername="mysql+pymysql")
    if made.get_backend_name() not in {"sqlite", "postgresql"}:
        raise ConfigurationError(
            f"database {made.render_as_string()!r}: expected a sqlite://, postgresql:// or mysql:// URL "
            "(MariaDB's driver is PyMySQL); set LLMTASKS_DATABASE_URL"
        )
    if made.get_backend_name() == "sqlite" and (made.database or ":memory:") == ":memory:":
        raise ConfigurationError(
            "database sqlite://: expected a file, because worker, beat and app share it; write sqlite:///path"
        )
    return made


def make_engine(url: URL) -> Engine:
    """An engine for a database; nothing is opened before its first use.

    Raises:
        ConfigurationError: The database's driver is not installed.
    """
    sqlite, mariadb = url.get_backend_name() == "sqlite", url.get_backend_name() in MARIADB
    arguments: dict[str, Any]
    options: dict[str, Any] = {}
    if sqlite:
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
        arguments = {"timeout": SQLITE_BUSY_TIMEOUT, "check_same_thread": False, "isolation_level": None}
    else:
        arguments = {"connect_timeout": CONNECT_TIMEOUT}
    if mariadb:
        # Under its default, locks on gaps between rows would stop the INSERTs of others.
        options = {"isolation_level": "READ COMMITTED"}
    try:
        engine = create_engine(url, connect_args=arguments, pool_size=5, max_overflow=50, **options)
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
    if mariadb:
        event.listen(engine, "connect", _be_strict, insert=True)  # before SQLAlchemy looks at the mode
    return engine


def check_server(engine: Engine) -> None:
    """See to it that an engine's server, which it has been connected to, is one that can do what is asked of it.

    Raises:
        ConfigurationError: It is too old.
    """
    dialect: Any = engine.dialect
    if dialect.name not in MARIADB:
        return
    said = ".".join(map(str, dialect.server_version_info))
    if not dialect.is_mariadb:
        logger.warning("the database calls itself MySQL %s: llmtasks is tested with MariaDB only", said)
    elif dialect.server_version_info < OLDEST_MARIADB:
        oldest = ".".join(map(str, OLDEST_MARIADB))
        raise ConfigurationError(f"the database is MariaDB {said}: expected {oldest} or newer, which skips locked rows")


def _tune_sqlite(connection: Any, _record: object) -> None:
    # WAL with NORMAL survives the death of any process; only a power cut may take the last transactions.
    connection.execute("PRAGMA synchronous=NORMAL")


def _be_strict(connection: Any, _record: object) -> None:
    # Whatever the server's own mode: no text is cut to its column's length, and SQL is quoted as everywhere.
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION sql_mode = 'STRICT_ALL_TABLES'")


def use_wal(engine: Engine) -> None:
    """Readers never wait for writers, and a commit does not wait for the disk; the file keeps the mode."""
    with engine.connect() as connection:
        connection.rollback()  # no mode changes inside a transaction
        raw = connection.connection.dbapi_connection
        assert raw is not None
        raw.cursor().execute("PRAGMA journal_mode=WAL")


def _begin_sqlite(connection: Connection) -> None:
    raw = connection.connection.dbapi_connection
    assert raw is not None
    # Past SQLAlchemy, which takes 15 us to execute it; _unavailable knows the driver's own error.
    cursor: Any = raw.cursor()
    if connection.get_execution_options().get("write"):
        _begin_to_write(cursor)
    else:
        cursor.execute("BEGIN")


def _begin_to_write(cursor: Any) -> None:
    """Wait for the write lock, and look for it every millisecond or two.

    A deferred transaction that turns into a writer would fail at once. SQLite's own wait sleeps longer each time, up to
    100 ms: whoever waits beside somebody that writes often, such as a purge, misses every moment in between.
    """
    began = time.monotonic()
    while True:
        waited = time.monotonic() - began
        cursor.execute(f"PRAGMA busy_timeout={SHORT_WAIT if waited < LONG_WAITED else LONG_WAIT}")
        try:
            cursor.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or waited > SQLITE_BUSY_TIMEOUT:
                raise
        else:
            return
        finally:
            cursor.execute(_USUAL_WAIT)
