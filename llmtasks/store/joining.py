"""Joining the application's own transaction: what is written exists if that one commits, else it never did."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection

from llmtasks.errors import ConfigurationError
from llmtasks.store.database import Database
from llmtasks.store.dialects import MARIADB

#: Where servers listen unless an URL says otherwise.
PORTS: Final = {"postgresql": 5432, "mysql": 3306}


def joined(database: Database, session: Any) -> Connection:
    """The connection of a SQLAlchemy Session, so that what is written commits or rolls back with it.

    Raises:
        ConfigurationError: The session is on another database.
    """
    with database.reading():
        pass  # the tables exist before the caller's transaction relies on them
    theirs: URL = session.get_bind().engine.url  # bound to an engine, or to one of its connections
    if _place(theirs) != _place(database.url):
        raise ConfigurationError(
            f"the session is on {theirs.render_as_string()!r}, llmtasks keeps its tables in "
            f"{database.url.render_as_string()!r}: use a session on the same database, or none"
        )
    connection: Connection = session.connection()
    return connection


def _place(url: URL) -> tuple[object, ...]:
    kind = url.get_backend_name()
    if kind == "sqlite":
        return ("sqlite", Path(str(url.database)).absolute())
    kind = "mysql" if kind in MARIADB else kind
    # PostgreSQL's socket, or host, and MariaDB's socket may stand behind the question mark.
    host = url.query.get("unix_socket") or url.host or url.query.get("host") or "localhost"
    return (kind, "localhost" if host in {"127.0.0.1", "::1"} else host, url.port or PORTS.get(kind), url.database)
