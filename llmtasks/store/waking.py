"""Waking: beat sleeps until its next schedule is due, or until somebody changes the schedules.

PostgreSQL tells at the moment of the commit. SQLite says for next to nothing whether anybody has written since.
MariaDB does neither: there beat looks at the schedules four times a second.
"""

from __future__ import annotations

import contextlib
import select
import time
from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from llmtasks.errors import LLMTasksError
from llmtasks.store.database import Database
from llmtasks.store.dialects import MARIADB
from llmtasks.store.lone import Lone, driver_errors
from llmtasks.store.schedules import CHANNEL

#: Seconds between two looks at SQLite's data_version: how soon a change by another process takes effect.
SQLITE_PROBE: Final = 0.02
#: The same where a server does not tell, or is away: each look is a query.
POLL: Final = 0.25


class Waking:
    """One thread's way to sleep on a database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._polls = database.url.get_backend_name() in MARIADB
        self._lone: Lone | None = None
        #: SQLite's data_version when it was looked at last: it counts the commits of other connections.
        self._version = 0

    def sleep(self, seconds: float) -> None:
        """Return after ``seconds``, or soon after somebody changed schedules; early is allowed, an error is not.

        Whoever uses the database next learns that it is away.
        """
        if self._polls:
            time.sleep(min(seconds, POLL))
            return
        try:
            if self._lone is None:
                self._open()  # what changed before is not told: the caller looks once more
                return
            with driver_errors(self._lone.dialect):
                self._sleep(self._lone, seconds)
        except (LLMTasksError, DBAPIError):
            self.close()
            time.sleep(min(seconds, POLL))

    def close(self) -> None:
        """Give the connection back."""
        lone, self._lone = self._lone, None
        if lone is not None:
            with contextlib.suppress(Exception):  # what closing a broken connection raises differs among drivers
                lone.driver.close()

    def _open(self) -> None:
        lone = self._lone = self._database.own_lone()  # kept at once: whatever fails from here on closes it
        with driver_errors(lone.dialect):
            if lone.dialect.name == "postgresql":
                lone.execute(f"LISTEN {CHANNEL}", None)
            else:
                self._version = _data_version(lone)

    def _sleep(self, lone: Lone, seconds: float) -> None:
        if lone.dialect.name == "sqlite":
            self._probe(lone, seconds)
        else:
            self._listen(lone, seconds)

    def _probe(self, lone: Lone, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, SQLITE_PROBE))
            version = _data_version(lone)
            if version != self._version:
                self._version = version
                return

    def _listen(self, lone: Lone, seconds: float) -> None:
        if not list(lone.driver.notifies(timeout=0)):  # what came while nobody slept
            select.select([lone.driver.fileno()], [], [], seconds)
            list(lone.driver.notifies(timeout=0))


def _data_version(lone: Lone) -> int:
    version: Any = lone.execute("PRAGMA data_version", ()).fetchone()
    return int(version[0])
