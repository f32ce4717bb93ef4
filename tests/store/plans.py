"""How a database would run a statement: by which indexes, and what it would read from end to end."""

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from llmtasks.store.database import Database


@dataclass(frozen=True)
class Plan:
    """What the database says of a statement.

    Attributes:
        text: All of it, for failure reports.
        indexes: What it would use.
        scanned: Tables, or indexes, that it would read from end to end.
        sorts: Whether it would sort rows itself.
    """

    text: str
    indexes: set[str]
    scanned: set[str]
    sorts: bool


def analyze(database: Database, table: str) -> None:
    """Let a server count, as it does by itself in time; SQLite plans well without."""
    commands = {"postgresql": "ANALYZE", "mysql": "ANALYZE TABLE"}
    if not database.is_sqlite:
        with database.transaction() as tx:
            tx.execute(text(f"{commands[tx.dialect.name]} {table}")).close()


def plan_of(tx: Connection, statement: str, parameters: Any) -> Plan:
    """The plan of a statement in the driver's spelling."""
    explain = "EXPLAIN QUERY PLAN " if tx.dialect.name == "sqlite" else "EXPLAIN "
    found = tx.exec_driver_sql(explain + statement, parameters).mappings().all()
    said = "\n".join(str(dict(row)) for row in found)
    if tx.dialect.name == "mysql":
        return Plan(
            text=said,
            indexes={row["key"] for row in found if row["key"]},
            scanned={row["table"] for row in found if row["type"] in {"ALL", "index"}},
            sorts="filesort" in said,
        )
    return Plan(
        text=said,
        indexes=set(re.findall(r"\w*(?:ix|uq|pkey)_?\w*", said)),
        scanned=set(re.findall(r"(?:Seq Scan on|SCAN) (\w+)", said)),
        sorts=bool(re.search(r"\bSort\b|TEMP B-TREE", said)),
    )
