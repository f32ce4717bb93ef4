"""What each dialect of SQL spells by itself: INSERTs of rows that may be there, and which rows a SELECT locks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ARRAY, Column, ColumnElement, Table, any_, bindparam

if TYPE_CHECKING:
    from sqlalchemy import Insert, Select

#: How SQLAlchemy calls MariaDB; a session of the application's may call it by either name.
MARIADB: Final = frozenset({"mysql", "mariadb"})


def insert_if_new(table: Table, dialect: str) -> Insert:
    """An INSERT that leaves a row which is there as it is, and says how many rows it made."""
    statement = insert_into(table, dialect)
    # MariaDB would cut what is too long as well; the lengths are checked before.
    new: Insert = statement.prefix_with("IGNORE") if dialect in MARIADB else statement.on_conflict_do_nothing()
    return new.execution_options(preserve_rowcount=True)


def insert_or_lock(table: Table, dialect: str, key: str) -> Insert:
    """An INSERT that leaves a row which is there by its ``key`` as it is; whoever means to change the row begins so.

    MariaDB's IGNORE would share the lock of such a row among many, none of whom could go on.
    """
    statement = insert_into(table, dialect)
    new: Insert
    if dialect in MARIADB:
        new = statement.on_duplicate_key_update({key: table.c[key]})
    else:
        new = statement.on_conflict_do_nothing()
    return new


def insert_or_change(table: Table, dialect: str, key: str, changes: Iterable[str]) -> Insert:
    """An INSERT that gives a row which is there by its ``key`` the new values of ``changes``."""
    statement = insert_into(table, dialect)
    changing: Insert
    if dialect in MARIADB:
        changing = statement.on_duplicate_key_update({name: statement.inserted[name] for name in changes})
    else:
        new = {name: statement.excluded[name] for name in changes}
        changing = statement.on_conflict_do_update(index_elements=[key], set_=new)
    return changing


def insert_into(table: Table, dialect: str) -> Any:
    """An INSERT that knows what each dialect spells by itself."""
    # Only the dialect in use: PostgreSQL's alone takes 25 ms and 3 MB to import.
    if dialect == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    if dialect in MARIADB:
        from sqlalchemy.dialects import mysql

        return mysql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)


def by_index(query: Select[Any], table: Table, index: str) -> Select[Any]:
    """A SELECT that locks only the rows that it returns: MariaDB locks all that it reads before it sorts them."""
    for name in MARIADB:
        query = query.with_hint(table, f"FORCE INDEX ({index})", name)
    return query


def among(column: Column[Any], name: str, dialect: str) -> ColumnElement[bool]:
    """Whether a column is one of the values that are bound to ``name`` as a list.

    PostgreSQL takes the list as one value: the text is the same however many there are, so it plans it once.
    """
    if dialect == "postgresql":
        return column == any_(bindparam(name, type_=ARRAY(column.type)))
    return column.in_(bindparam(name, expanding=True))


class PerDialect:
    """A statement that each dialect spells by itself, by the dialect's name; built when it is used first."""

    def __init__(self, build: Callable[[str], Any]) -> None:
        self._build = build
        self._built: dict[str, Any] = {}

    def __getitem__(self, dialect: str) -> Any:
        found = self._built.get(dialect)
        if found is None:
            found = self._built[dialect] = self._build(dialect)
        return found
