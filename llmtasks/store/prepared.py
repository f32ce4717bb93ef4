"""Prepared: a statement of the hot path, compiled once and run past most of SQLAlchemy.

Finding a statement in SQLAlchemy's cache, binding its values and wrapping its result take three times as long as SQLite
takes to run it. Only for single statements without lists of values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, Dialect

from llmtasks.store.lone import Lone

Convert = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compiled:
    """A statement as the driver takes it."""

    sql: str
    #: The values that the statement itself has for its names.
    own: Mapping[str, Any]
    #: How the values of some names are converted.
    converts: Sequence[tuple[str, Convert]]
    #: The names in the driver's order where it counts its parameters; None where it names them.
    order: Sequence[str] | None

    def bound(self, values: Mapping[str, Any]) -> Any:
        """Values as the driver takes them."""
        given = {**self.own, **values}
        for name, convert in self.converts:
            given[name] = convert(given[name])
        return given if self.order is None else [given[name] for name in self.order]


class Prepared:
    """A statement of the hot path.

    Args:
        build: Makes the statement for a dialect's name.
        returning: The columns that it returns.
    """

    def __init__(self, build: Callable[[str], Any], returning: Sequence[Column[Any]] = ()) -> None:
        self._build = build
        self._returning = returning
        self._compiled: dict[str, _Compiled] = {}
        #: How the values of a returned row are converted.
        self._results: dict[str, list[Convert | None]] = {}

    def one(self, tx: Connection | Lone, values: Mapping[str, Any]) -> list[Any] | None:
        """Run it; returns its row, whose columns are those of ``returning``, or None."""
        cursor = _run(tx, self._of(tx.dialect), values)
        row = cursor.fetchone()
        if row is None:
            return None
        found = _converted(row, self._converts(tx.dialect, cursor))
        cursor.close()
        return found

    def all(self, tx: Connection | Lone, values: Mapping[str, Any]) -> list[list[Any]]:
        """Run it; returns its rows, whose columns are those of ``returning``."""
        cursor = _run(tx, self._of(tx.dialect), values)
        converts = self._converts(tx.dialect, cursor)
        return [_converted(row, converts) for row in cursor.fetchall()]

    def count(self, tx: Connection | Lone, values: Mapping[str, Any]) -> int:
        """Run it; returns how many rows it changed."""
        rowcount: int = _run(tx, self._of(tx.dialect), values).rowcount
        return rowcount

    def many(self, tx: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Run it once for each of some rows of values; returns how many rows it changed in all."""
        compiled = self._of(tx.dialect)
        bound: list[Any] = [compiled.bound(values) for values in rows]
        if tx.dialect.name == "sqlite":
            return int(tx.connection.cursor().executemany(compiled.sql, bound).rowcount)
        if compiled.order is not None:
            bound = [tuple(values) for values in bound]
        return tx.exec_driver_sql(compiled.sql, bound).rowcount

    def _converts(self, dialect: Dialect, cursor: Any) -> list[Convert | None]:
        found = self._results.get(dialect.name)
        if found is None:
            found = self._results[dialect.name] = _converts(self._returning, dialect, cursor)
        return found

    def _of(self, dialect: Dialect) -> _Compiled:
        found = self._compiled.get(dialect.name)
        if found is None:
            found = self._compiled[dialect.name] = _compile(self._build(dialect.name), dialect)
        return found


def _compile(statement: Any, dialect: Dialect) -> _Compiled:
    compiled = statement.compile(dialect=dialect)
    types = {name: bind.type for bind, name in compiled.bind_names.items()}
    converts = {name: kind.dialect_impl(dialect).bind_processor(dialect) for name, kind in types.items()}
    return _Compiled(
        sql=str(compiled),
        own={name: compiled.params[name] for name in types},
        converts=[(name, convert) for name, convert in converts.items() if convert is not None],
        order=compiled.positiontup if compiled.positional else None,
    )


def _converted(row: Sequence[Any], converts: Sequence[Convert | None]) -> list[Any]:
    return [value if convert is None else convert(value) for value, convert in zip(row, converts, strict=True)]


def _converts(returning: Sequence[Column[Any]], dialect: Dialect, cursor: Any) -> list[Convert | None]:
    return [
        column.type.dialect_impl(dialect).result_processor(dialect, described[1])
        for column, described in zip(returning, getattr(cursor, "cursor", cursor).description, strict=True)
    ]


def _run(tx: Connection | Lone, compiled: _Compiled, values: Mapping[str, Any]) -> Any:
    """Run a statement; returns the driver's own cursor, or SQLAlchemy's result, whose rows are the driver's."""
    bound = compiled.bound(values)
    if isinstance(tx, Lone):
        return tx.execute(compiled.sql, bound)
    if tx.dialect.name == "sqlite":  # no connection to lose; Database knows what the driver raises
        return tx.connection.cursor().execute(compiled.sql, bound)
    return tx.exec_driver_sql(compiled.sql, bound)
