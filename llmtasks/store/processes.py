"""Workers and beats: that they live, what they use, what a beat declares."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, RowMapping, bindparam, delete, select

from llmtasks.store.rows import insert_into, processes, values_of

#: A process that is silent for this long is forgotten.
FORGET_AFTER: Final = timedelta(hours=1)
_FORGET: Final = delete(processes).where(processes.c.heartbeat_at < bindparam("before"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A worker or beat as it last described itself; memory in bytes, children included."""

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


def stamp(tx: Connection, process: Process) -> None:
    """Write down that a process lives and how it is."""
    row = {name: getattr(process, name) for name in Process.__dataclass_fields__}
    row["declared"] = json.dumps(process.declared) if process.kind == "beat" else None
    statement = insert_into(processes, tx.dialect.name).values(row)
    changes = {name: statement.excluded[name] for name in row if name not in {"id", "started_at"}}
    tx.execute(statement.on_conflict_do_update(index_elements=["id"], set_=changes))


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
    values["declared"] = tuple(json.loads(values["declared"] or "[]"))
    return Process(**values)
