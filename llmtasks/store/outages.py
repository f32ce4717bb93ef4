"""Outages: which of a driver's errors mean that the database, and not the statement, is at fault."""

from __future__ import annotations

import sqlite3
from typing import Final

from sqlalchemy import exc

#: MariaDB's errors about itself. PyMySQL calls most others "operational" too, a misspelt column for one.
_MARIADB: Final = frozenset(
    {
        1021, 1037, 1038, 1041,  # the disk or the memory is full
        1040, 1203, 1226,  # too many connections
        1044, 1045, 1049, 1129, 1130, 1698,  # no such user, password or database; the host is blocked
        1042, 1043, 1047, 1053, 1077, 1079, 1158, 1159, 1160, 1161, 1184, 1317, 1927, 4031,  # shut down, cut, not ready
        1205, 1213, 1969, 3024,  # waited too long for a lock, deadlocked, ran out of time
        1290, 1792, 1836,  # read-only
    }
)  # fmt: skip
#: From here on the client itself says that the server is not there, or went away.
_MARIADB_CLIENT: Final = range(2000, 3000)


def is_outage(error: Exception) -> bool:
    """Whether the same call may work later: the database is away, overloaded, locked, or broke the connection."""
    if isinstance(error, exc.TimeoutError | sqlite3.OperationalError):
        return True
    if not isinstance(error, exc.DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if not isinstance(error, exc.OperationalError | exc.InterfaceError):
        return False
    number = _number(error)
    return number is None or number in _MARIADB or number in _MARIADB_CLIENT


def first_line(error: BaseException) -> str:
    """What the driver said, without SQLAlchemy's explanations."""
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


def _number(error: exc.DBAPIError) -> int | None:
    """The number that MariaDB gives its errors; None with the other databases, and where the driver knows none."""
    given = error.orig.args[:1] if error.orig is not None else ()
    return given[0] if given and isinstance(given[0], int) and given[0] else None
