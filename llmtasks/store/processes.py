"""Workers and beats: that they live, what they use, what they know."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, RowMapping, bindparam, delete, select, update

from llmtasks.store.dialects import insert_or_change
from llmtasks.store.rows import processes, values_of

#: A process that is silent for this long is forgotten.
FORGET_AFTER: Final = timedelta(hours=1)
_FORGET: Final = delete(processes).where(processes.c.heartbeat_at < bindparam("before"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A worker or beat as it last described itself; memory in bytes, children included.

    Attributes:
        declared: The schedules that a beat finds in code.
        functions: The task functions that a worker can run and a beat can fire.
        clock_offset: Seconds by which the clock of its host is ahead of the database's.
    """

    id: str
    app: str
    kind: str
    name: str
    pid: int
    pool: str | None
    concurrency: int | None
    started_at: datetime
    heartbeat_at: datetime
    cpu_percent: float | None
    memory: int | None
    declared: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    clock_offset: float | None = None


#: What each stamp writes; the rest, which may be long, is written once.
_SIGNS: Final = ("heartbeat_at", "cpu_percent", "memory", "clock_offset")
_LISTS: Final = ("declared", "functions")


def stamp(tx: Connection, process: Process, *, anew: bool = False) -> None:
    """Write down that a process lives and how it is.

    Args:
        process: The process as it is now.
        anew: What it is and knows has changed since its first stamp and is written too.
    """
    row = {name: getattr(process, name) for name in Process.__dataclass_fields__}
    if not anew:
        signs = {name: row[name] for name in _SIGNS}
        if tx.execute(update(processes).where(processes.c.id == process.id).values(signs)).rowcount:
            return
    row |= {name: json.dumps(row[name]) for name in _LISTS}
    changes = row.keys() - {"id", "started_at"}
    tx.execute(insert_or_change(processes, tx.dialect.name, "id", sorted(changes)).values(row))


def leave(tx: Connection, process_id: str) -> None:
    """A process ends in order."""
    tx.execute(delete(processes).where(processes.c.id == process_id))


def alive(tx: Connection, app: str, since: datetime, kind: str | None = None) -> list[Process]:
    """The processes of an app that were heard of since then."""
    query = (
        select(processes)
        .where(processes.c.app == app, processes.c.heartbeat_at >= since)
        .order_by(processes.c.started_at)
    )
    if kind is not None:
        query = query.where(processes.c.kind == kind)
    return [_process(row) for row in tx.execute(query).mappings()]


def forget_silent(tx: Connection, now: datetime) -> None:
    """Delete the rows of processes that are long gone."""
    tx.execute(_FORGET, {"before": now - FORGET_AFTER})


def _process(row: RowMapping) -> Process:
    values = values_of(row)
    for name in _LISTS:
        values[name] = tuple(json.loads(values[name] or "[]"))
    return Process(**values)
