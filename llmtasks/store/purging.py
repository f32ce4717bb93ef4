"""Purging: old runs leave the ledger a few at a time, so that nobody waits for the rows, or on SQLite for the file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from sqlalchemy import ColumnElement, Connection, and_, delete, func, or_, select

from llmtasks.states import ENDED
from llmtasks.store import keys, totals
from llmtasks.store.database import Database
from llmtasks.store.rows import runs

#: Rows of one transaction. While a million were purged from SQLite on two busy cores, others waited for the write lock
#: 109 ms (p99) with 1,000 and no pause, 57 ms with pauses, and 28 ms with 250 and pauses.
SLICE: Final = 250


def purge(database: Database, app: str, before: datetime, func_name: str | None = None) -> Iterator[int]:
    """Delete the runs that ended before ``before`` and were delivered; says after each slice how many it deleted.

    Between two slices others have as much time as the last one took. Totals of hours before then go too.
    """
    while True:
        began = time.monotonic()
        with database.transaction() as tx:
            found = purge_slice(tx, app, before, func_name)
        yield found
        if found < SLICE:
            break
        time.sleep(time.monotonic() - began)
    if func_name is None:
        with database.transaction() as tx:
            totals.forget(tx, app, before)


def purge_slice(tx: Connection, app: str, before: datetime, func_name: str | None = None) -> int:
    """Delete one slice of them, the oldest first; returns how many."""
    query = select(runs.c.id).where(_purgeable(app, before, func_name)).order_by(runs.c.ended_at).limit(SLICE)
    ids = list(tx.execute(query).scalars())
    if ids:
        keys.forget(tx, ids)
        tx.execute(delete(runs).where(runs.c.id.in_(ids), runs.c.state.in_(ENDED)))
    return len(ids)


def purgeable(tx: Connection, app: str, before: datetime, func_name: str | None = None) -> int:
    """How many runs ``purge`` would delete."""
    query = select(func.count()).select_from(runs).where(_purgeable(app, before, func_name))
    return tx.execute(query).scalar_one()


def _purgeable(app: str, before: datetime, func_name: str | None) -> ColumnElement[bool]:
    # A cancellation of an id whose message never came has nobody to be told.
    over = and_(runs.c.state.in_(ENDED), or_(runs.c.delivered, runs.c.func_name == ""))
    condition = and_(runs.c.app == app, runs.c.ended_at < before, over)
    return condition if func_name is None else and_(condition, runs.c.func_name == func_name)
