"""Batches: one statement for many rows of values, past most of SQLAlchemy.

PostgreSQL takes all of them as one JSON text: half the time of a statement a row, on both sides. Elsewhere the driver
runs the statement row by row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, bindparam

from llmtasks.store.dialects import insert_if_new
from llmtasks.store.prepared import Prepared


class Batch:
    """A statement for many rows at once.

    Args:
        each: Makes the statement for one row and a dialect's name.
        together: The same as PostgreSQL's text, for all of ``{rows}``.
        table: Has a column for each value, by its name.
    """

    def __init__(self, each: Callable[[str], Any], together: str, table: Table) -> None:
        self._each = Prepared(each)
        # The table's own row type says what each value is.
        self._together = together.format(rows=f"json_populate_recordset(NULL::{table.name}, %(rows)s::json)")

    def run(self, tx: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Run it; returns how many rows it made or changed."""
        if not rows:
            return 0
        if tx.dialect.name != "postgresql":
            return self._each.many(tx, rows)
        values = {"rows": json.dumps(rows, default=_instant)}
        found: int = tx.exec_driver_sql(self._together, values).rowcount
        return found


def insertion(table: Table, names: Sequence[str]) -> Batch:
    """INSERTs of these columns that leave a row which is there as it is."""
    columns = ", ".join(names)
    return Batch(
        lambda dialect: insert_if_new(table, dialect).values({name: bindparam(name) for name in names}),
        f"INSERT INTO {table.name} ({columns}) SELECT {columns} FROM {{rows}} ON CONFLICT DO NOTHING",
        table,
    )


def _instant(value: Any) -> str:
    """An instant as PostgreSQL reads it from JSON; ``json`` has no word for it."""
    if not isinstance(value, datetime):
        raise TypeError(f"{value!r} is of type {type(value).__name__}: expected what a column can hold")
    if value.tzinfo is None:
        raise ValueError(f"naive datetime {value!r}: expected one with a time zone")
    return value.isoformat()
