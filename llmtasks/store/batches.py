"""Batches: one statement for many rows of values, past most of SQLAlchemy.

PostgreSQL takes all of them as one JSON text: half the time of a statement a row, on both sides, and psycopg would
spend as much again on an array for each column. Elsewhere the driver runs the statement row by row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import JSON, Column, ColumnElement, Connection, Table, Text, bindparam, cast, column, func, select

from llmtasks.store.dialects import insert_if_new
from llmtasks.store.prepared import Prepared

if TYPE_CHECKING:
    from sqlalchemy.types import TypeEngine

#: The values of a row in a statement, by their names.
Given: TypeAlias = Mapping[str, ColumnElement[Any]]


class Batch:
    """A statement for many rows of values.

    Args:
        build: Makes the statement for a dialect's name and the values of a row.
        types: The values' names and types.
        returning: The columns that it returns.
    """

    def __init__(
        self,
        build: Callable[[str, Given], Any],
        types: Mapping[str, TypeEngine[Any]],
        returning: Sequence[Column[Any]] = (),
    ) -> None:
        self._names = tuple(types)
        self._each = Prepared(lambda dialect: build(dialect, bound(types)), returning)
        self._together = Prepared(lambda dialect: build(dialect, _listed(types)), returning)

    def run(self, tx: Connection, rows: Iterable[Mapping[str, Any]]) -> int:
        """Run it; returns how many rows it made or changed."""
        given = list(rows)
        if not given:
            return 0
        if tx.dialect.name != "postgresql":
            return self._each.many(tx, given)
        return self._together.count(tx, {"rows": self._as_json(given)})

    def all(self, tx: Connection, rows: Iterable[Mapping[str, Any]], **values: Any) -> list[list[Any]]:
        """Run it on PostgreSQL, with ``values`` that are the same for all rows; returns its rows."""
        return self._together.all(tx, {**values, "rows": self._as_json(rows)})

    def _as_json(self, rows: Iterable[Mapping[str, Any]]) -> str:
        return json.dumps([{name: row[name] for name in self._names} for row in rows], default=_instant)


def insertion(table: Table, names: Sequence[str]) -> Batch:
    """INSERTs of these columns that leave a row which is there as it is."""

    def build(dialect: str, given: Given) -> Any:
        statement = insert_if_new(table, dialect)
        if dialect != "postgresql":
            return statement.values(dict(given))
        return statement.from_select(list(given), select(*given.values()))

    return Batch(build, {name: table.c[name].type for name in names})


def bound(types: Mapping[str, TypeEngine[Any]]) -> Given:
    """The values of one row, bound by their names."""
    return {name: bindparam(name, type_=kind) for name, kind in types.items()}


def _listed(types: Mapping[str, TypeEngine[Any]]) -> Given:
    """Columns of a table whose rows are the values that are given as one JSON text. PostgreSQL's own."""
    rows = func.json_to_recordset(cast(bindparam("rows", type_=Text()), JSON))
    columns = [column(name, kind) for name, kind in types.items()]
    table = rows.table_valued(*columns).render_derived(name="given", with_types=True)
    return {name: table.c[name] for name in types}


def _instant(value: Any) -> str:
    """An instant as PostgreSQL reads it from JSON; ``json`` has no word for it."""
    if not isinstance(value, datetime):
        raise TypeError(f"{value!r} is of type {type(value).__name__}: expected what a column can hold")
    if value.tzinfo is None:
        raise ValueError(f"naive datetime {value!r}: expected one with a time zone")
    return value.isoformat()
