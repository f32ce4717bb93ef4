"""Statements that are a transaction of their own: past SQLAlchemy's pool and transactions, in one round trip.

Most runs need one to be claimed and one to be ended; what surrounds a statement costs more than the statement.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Dialect, Engine, exc

from llmtasks.store.pinging import IDLE


@dataclass(frozen=True, slots=True)
class Lone:
    """A connection of the driver on which each statement commits by itself."""

    dialect: Dialect
    driver: Any

    def execute(self, sql: str, values: Any) -> Any:
        """Run a statement; returns the driver's cursor."""
        cursor = self.driver.cursor()
        cursor.execute(sql, values)
        return cursor


class LoneConnections:
    """An engine's connections for lone statements: as many as are in use at once."""

    def __init__(self) -> None:
        self._idle: list[tuple[Lone, float]] = []

    @contextmanager
    def taken(self, engine: Engine) -> Generator[Lone]:
        """A connection for one caller.

        Raises:
            DBAPIError: What the driver raised, as SQLAlchemy raises it.
        """
        with driver_errors(engine.dialect):
            lone = self._take(engine)
            try:
                yield lone
            except BaseException:
                with contextlib.suppress(Exception):
                    lone.driver.close()
                raise
        self._idle.append((lone, time.monotonic()))

    def close(self) -> None:
        """Close what nobody uses now."""
        while self._idle:
            self._idle.pop()[0].driver.close()

    def _take(self, engine: Engine) -> Lone:
        while self._idle:
            try:
                lone, since = self._idle.pop()
            except IndexError:  # another thread was quicker
                break
            if time.monotonic() - since < IDLE or _answers(lone):
                return lone
            lone.driver.close()
        return open_lone(engine)


@contextmanager
def driver_errors(dialect: Dialect) -> Generator[None]:
    """Raise what the driver raises as SQLAlchemy raises it."""
    try:
        yield
    except dialect.loaded_dbapi.Error as error:
        gone = dialect.is_disconnect(error, None, None)
        raise exc.DBAPIError.instance(
            None, None, error, dialect.loaded_dbapi.Error, connection_invalidated=gone, dialect=dialect
        ) from error


def open_lone(engine: Engine) -> Lone:
    """A new connection, which is the caller's to close. Raises what the driver raises."""
    connection = engine.raw_connection()
    driver: Any = connection.driver_connection
    connection.detach()
    engine.dialect.set_isolation_level(driver, "AUTOCOMMIT")
    return Lone(engine.dialect, driver)


def _answers(lone: Lone) -> bool:
    try:
        return bool(lone.dialect.do_ping(lone.driver))
    except lone.dialect.loaded_dbapi.Error:
        return False
