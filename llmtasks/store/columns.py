"""Types of columns: instants, which are UTC and refuse naive values, and texts of any length, on every database."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import DateTime, Dialect, Text, TypeDecorator

from llmtasks.store.dialects import MARIADB

if TYPE_CHECKING:
    from sqlalchemy.types import TypeEngine


class UtcDateTime(TypeDecorator[datetime]):
    """A UTC instant: naive datetimes are refused on the way in and never come out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Keep microseconds where a DATETIME alone has whole seconds."""
        if dialect.name not in MARIADB:
            return super().load_dialect_impl(dialect)
        from sqlalchemy.dialects import mysql

        return mysql.DATETIME(fsp=6)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive values; turn the rest to UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive datetime {value!r}: expected one with a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Put UTC back where the database does not keep it."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class LongText(TypeDecorator[str]):
    """A text of any length, where a TEXT alone holds 64 KB too."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """MariaDB's type for it."""
        if dialect.name not in MARIADB:
            return super().load_dialect_impl(dialect)
        from sqlalchemy.dialects import mysql

        return mysql.LONGTEXT()
