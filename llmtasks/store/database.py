"""Database: one engine per process and URL, short transactions, the database's own clock.

SQLite (WAL, busy timeout, BEGIN IMMEDIATE for every write), PostgreSQL (psycopg 3) and MariaDB (PyMySQL, READ
COMMITTED) are used through the same calls.
No process forks while one of its threads is inside a transaction of ours, and a child never touches a connection of its
parent.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from weakref import WeakSet

from sqlalchemy import Connection, Engine, exc, func, select, text

from llmtasks.errors import ConfigurationError, DatabaseUnavailableError, SchemaOutdatedError
from llmtasks.store.columns import UtcDateTime
from llmtasks.store.engines import check_server, database_url, make_engine, use_wal
from llmtasks.store.forking import fork_gate
from llmtasks.store.lone import Lone, LoneConnections, driver_errors, open_lone
from llmtasks.store.outages import first_line, is_outage
from llmtasks.store.rows import SCHEMA_VERSION, VERSION_TABLE

#: Seconds after which the difference to the server's clock is measured again.
CLOCK_REFRESH: Final = 10.0
#: How servers are asked for their clocks.
_CLOCKS: Final = {
    "postgresql": select(func.clock_timestamp(type_=UtcDateTime())),
    "mysql": select(func.utc_timestamp(6, type_=UtcDateTime())),
}


class Database:
    """The schedules and the ledger behind one URL. Safe to share among threads and to inherit over a fork."""

    def __init__(self, url: str) -> None:
        self.url = database_url(url)
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._lones = LoneConnections()
        self._ready = False
        self._offset: timedelta | None = None
        self._measured = -CLOCK_REFRESH
        _all.add(self)

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a SQLite file."""
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def transaction(self) -> Generator[Connection]:
        """A write transaction: committed when the block is left, rolled back when it raises.

        Raises:
            DatabaseUnavailableError: The database cannot be reached, or stays locked.
            SchemaOutdatedError: Its tables are not those of this version.
            ConfigurationError: The file is no database.
        """
        with fork_gate.entered(), self._unavailable(), self._ready_engine.connect() as connection:
            connection.execution_options(write=True)
            with connection.begin():
                yield connection

    @contextmanager
    def reading(self) -> Generator[Connection]:
        """A read transaction; it never waits for writers on SQLite. Raises as ``transaction`` does."""
        with fork_gate.entered(), self._unavailable(), self._ready_engine.connect() as connection:
            yield connection

    @contextmanager
    def lone(self) -> Generator[Lone]:
        """A connection on which each statement is a transaction of its own. Raises as ``transaction`` does."""
        with fork_gate.entered(), self._unavailable(), self._lones.taken(self._ready_engine) as lone:
            yield lone

    def own_lone(self) -> Lone:
        """The same for one thread, which keeps and closes it. Raises as ``transaction`` does."""
        with fork_gate.entered(), self._unavailable():
            engine = self._ready_engine
            with driver_errors(engine.dialect):
                return open_lone(engine)

    def now(self) -> datetime:
        """This instant by the database's clock, so that every host compares with the same one.

        SQLite has the host's own clock. A server's is the host's monotonic clock plus a difference measured every 10 s;
        while the server is away the last one counts.

        Raises:
            DatabaseUnavailableError: The server never answered.
        """
        if self.is_sqlite:
            return datetime.now(UTC)
        offset = self._offset
        if offset is None or time.monotonic() - self._measured > CLOCK_REFRESH:
            try:
                offset = self._measure_clock()
            except DatabaseUnavailableError:
                if offset is None:
                    raise
        return datetime.fromtimestamp(time.monotonic(), UTC) + offset

    def version(self) -> str | None:
        """The schema version that the tables have; None where there are none."""
        with fork_gate.entered(), self._unavailable(), self._open_engine().connect() as connection:
            return _version(connection)

    def migrate(self, target: str = "head") -> None:
        """Bring the tables to schema version ``target``; does nothing where they have it.

        Safe to call from several processes at the same moment: one does it, the others wait.
        """
        engine = self._open_engine()
        with fork_gate.entered(), self._unavailable(), self._alone():
            if self.is_sqlite:
                use_wal(engine)
            _move(engine, target)

    def close(self) -> None:
        """Give back every connection; the next call opens new ones."""
        with self._lock:
            engine, self._engine, self._ready = self._engine, None, False
        self._lones.close()
        if engine is not None:
            engine.dispose()

    def forget(self) -> None:
        """In a forked child: neither use nor close what the parent opened (sqlite.org/howtocorrupt.html, 2.6)."""
        self._lock = threading.Lock()
        if self._engine is not None:
            _inherited.append((self._engine, self._lones))
        self._engine, self._lones, self._ready = None, LoneConnections(), False

    @property
    def _ready_engine(self) -> Engine:
        """The engine, once the tables are known to be right."""
        engine = self._open_engine()
        if self._ready:
            return engine
        if self.is_sqlite:
            self._prepare_file(engine)
        else:
            with engine.connect() as connection:
                check_server(engine)
                found = _version(connection)
            if found != SCHEMA_VERSION:
                raise SchemaOutdatedError(
                    f"the database has schema version {found or 'none'}, this llmtasks needs {SCHEMA_VERSION}: "
                    "run `celery llmtasks migrate`"
                )
        self._ready = True
        return engine

    def _open_engine(self) -> Engine:
        if self._engine is not None:
            return self._engine
        with self._lock:
            if self._engine is not None:
                return self._engine
            engine = make_engine(self.url)
            self._engine = engine
            return engine

    def _prepare_file(self, engine: Engine) -> None:
        """Switch a new file to WAL and create or upgrade its tables, one process at a time."""
        with engine.connect() as connection:
            if _version(connection) == SCHEMA_VERSION:
                return
        with self._alone():
            use_wal(engine)
            with engine.connect() as connection:
                found = _version(connection)
            if found != SCHEMA_VERSION:
                _move(engine, "head")

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Keep other processes from preparing the same file: two that switch it to WAL would meet "locked"."""
        if not self.is_sqlite:
            yield
            return
        with Path(f"{self.url.database}.lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _measure_clock(self) -> timedelta:
        with self.reading() as connection:
            before = time.monotonic()
            theirs: datetime = connection.execute(_CLOCKS[self.url.get_backend_name()]).scalar_one()
            middle = (before + time.monotonic()) / 2
        self._offset = offset = theirs - datetime.fromtimestamp(middle, UTC)
        self._measured = time.monotonic()
        return offset

    @contextmanager
    def _unavailable(self) -> Generator[None]:
        """Raise our own error where the server, and not the statement, is at fault."""
        try:
            yield
        except (exc.SQLAlchemyError, sqlite3.OperationalError) as error:
            if getattr(getattr(error, "orig", None), "sqlite_errorname", "") == "SQLITE_NOTADB":
                raise ConfigurationError(
                    f"{self.url.database} is not a SQLite file: set LLMTASKS_HOME or LLMTASKS_DATABASE_URL to another"
                ) from error
            if not is_outage(error):
                raise
            raise DatabaseUnavailableError(
                f"database {self.url.render_as_string()!r} does not answer: {first_line(error)}"
            ) from error


_databases: dict[str, Database] = {}
_all: Final[WeakSet[Database]] = WeakSet()
#: What the parent process had open, kept so that no destructor closes its connections in a child.
_inherited: list[tuple[Engine, LoneConnections]] = []


def database_at(url: str) -> Database:
    """The Database of this process behind ``url``; nothing is opened before its first use."""
    found = _databases.get(url)
    if found is None:
        found = _databases.setdefault(url, Database(url))
    return found


def _forget_inherited() -> None:
    for database in list(_all):
        database.forget()


os.register_at_fork(after_in_child=_forget_inherited)


def _move(engine: Engine, target: str) -> None:
    from llmtasks.store import migrations  # Alembic takes 0.2 s to import and is seldom needed

    with engine.execution_options(write=True).begin() as connection:
        migrations.lock(connection)
        migrations.move(connection, target)


def _version(connection: Connection) -> str | None:
    if not connection.dialect.has_table(connection, VERSION_TABLE):
        return None
    found: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return found
