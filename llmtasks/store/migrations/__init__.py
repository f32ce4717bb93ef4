"""Alembic migrations, run by Database.migrate; there is no alembic.ini."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from llmtasks.errors import DatabaseUnavailableError
from llmtasks.store.dialects import MARIADB

#: An arbitrary number that only llmtasks' migrations lock (PostgreSQL advisory locks).
ADVISORY_LOCK: Final = 7_162_340_001
#: Seconds that a migration of MariaDB waits for another one.
LOCK_PATIENCE: Final = 600
#: The names of MariaDB's locks are the server's, not the database's.
_LOCK: Final = text("SELECT GET_LOCK(CONCAT('llmtasks:', MD5(DATABASE())), :seconds)")


def configuration(connection: Connection | None = None) -> Config:
    """Alembic's configuration for this folder, on the caller's connection."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def lock(connection: Connection) -> None:
    """Wait until no other process migrates; held until the connection is given back. BEGIN IMMEDIATE locks SQLite.

    Raises:
        DatabaseUnavailableError: Another process held MariaDB's lock for too long.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
    if connection.dialect.name in MARIADB:
        # A change of a table ends a transaction there: the lock is the connection's, and goes when that is closed.
        connection.detach()
        if not connection.execute(_LOCK, {"seconds": LOCK_PATIENCE}).scalar():
            raise DatabaseUnavailableError(
                f"another process has been migrating the database for {LOCK_PATIENCE} seconds: look what it waits for"
            )


def move(connection: Connection, target: str) -> None:
    """Migrate up or down to revision ``target``; "head" is the newest, "base" none."""
    config = configuration(connection)
    if target == "head" or not _is_below(connection, config, target):
        command.upgrade(config, target)
    else:
        command.downgrade(config, target)


def _is_below(connection: Connection, config: Config, target: str) -> bool:
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from llmtasks.store.rows import VERSION_TABLE

    current = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
    if target == "base":
        return True
    above = [item.revision for item in ScriptDirectory.from_config(config).iterate_revisions("head", target)]
    return current in above and current != target
