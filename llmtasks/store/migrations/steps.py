"""Steps of migrations: one that was done before does nothing.

A change of a table is no part of a transaction on MariaDB: what an interrupted migration did there is there when the
next one begins.
"""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic import op

#: Names and ids differ by their case too, whatever the database's default is.
ON_MARIADB: Final[dict[str, Any]] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
}


def create_table(name: str, *parts: Any) -> None:
    """The table is there."""
    if not _look().has_table(name):
        op.create_table(name, *parts, **ON_MARIADB)


def drop_table(name: str) -> None:
    """The table is gone, with its indexes."""
    if _look().has_table(name):
        op.drop_table(name)


def add_column(table: str, column: sa.Column[Any]) -> None:
    """The table has the column."""
    if column.name not in _columns(table):
        op.add_column(table, column)


def drop_column(table: str, name: str) -> None:
    """The table does not have the column."""
    if name in _columns(table):
        op.drop_column(table, name)


def create_index(name: str, table: str, columns: list[str], **where: Any) -> None:
    """The table has the index; ``where`` says, for the databases that can, which rows are in it."""
    if not _look().has_index(table, name):
        op.create_index(name, table, columns, unique=False, **where)


def drop_index(name: str, table: str) -> None:
    """The table does not have the index."""
    if _look().has_index(table, name):
        op.drop_index(name, table_name=table)


def _columns(table: str) -> set[str]:
    return {column["name"] for column in _look().get_columns(table)}


def _look() -> sa.Inspector:
    # A new one each time: an inspector remembers what it saw.
    return sa.inspect(op.get_bind())
