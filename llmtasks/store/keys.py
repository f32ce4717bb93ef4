"""Keys: which run a unique function's arguments belong to; the primary key lets one of many be the first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, bindparam, delete, select, update

from llmtasks.states import RunState
from llmtasks.store.dialects import PerDialect, insert_or_lock
from llmtasks.store.rows import runs, unique


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The run that a key names."""

    run_id: str
    state: RunState
    accepted_at: datetime


_ADD: Final = PerDialect(
    lambda dialect: insert_or_lock(unique, dialect, "key").values(key=bindparam("of_key"), run_id="")
)
_LOCK: Final = (
    select(unique.c.key, unique.c.run_id)
    .where(unique.c.key.in_(bindparam("keys", expanding=True)))
    .order_by(unique.c.key)
    .with_for_update()
)
_NAMED: Final = select(runs.c.id, runs.c.state, runs.c.created_at).where(
    runs.c.id.in_(bindparam("ids", expanding=True))
)
_GIVE: Final = update(unique).where(unique.c.key == bindparam("of_key")).values(run_id=bindparam("to_run"))
_DROP: Final = delete(unique).where(unique.c.key.in_(bindparam("keys", expanding=True)), unique.c.run_id == "")
_OF_RUNS: Final = select(unique.c.key).where(unique.c.run_id.in_(bindparam("ids", expanding=True)))
_FORGET: Final = delete(unique).where(unique.c.key.in_(bindparam("keys", expanding=True)))


def lock(tx: Connection, keys: Collection[str]) -> dict[str, Holder]:
    """Keep all others from deciding about these keys until the transaction ends.

    Keys are locked in one order, before the rows of runs: no two transactions wait for each other.

    Returns:
        The runs that they name, by key; a key that names none, or one that is purged, is not there.
    """
    wanted = sorted(set(keys))
    named: dict[str, str] = {}
    while wanted and len(named) < len(wanted):  # one that a purge removed in between is put there again
        tx.execute(_ADD[tx.dialect.name], [{"of_key": key} for key in wanted])
        named = {row.key: row.run_id for row in tx.execute(_LOCK, {"keys": wanted})}
    # A statement of its own: on a server it sees what was committed while the lock was waited for.
    ids = [run_id for run_id in named.values() if run_id]
    found = {row.id: row for row in tx.execute(_NAMED, {"ids": ids})} if ids else {}
    return {
        key: Holder(run_id=run_id, state=RunState(found[run_id].state), accepted_at=found[run_id].created_at)
        for key, run_id in named.items()
        if run_id in found
    }


def give(tx: Connection, runs_by_key: Mapping[str, str]) -> None:
    """Name the runs that have these locked keys from now on."""
    if runs_by_key:
        tx.execute(_GIVE, [{"of_key": key, "to_run": run_id} for key, run_id in sorted(runs_by_key.items())])


def drop_unnamed(tx: Connection, keys: Collection[str]) -> None:
    """Leave no row for locked keys that no run got."""
    if keys:
        tx.execute(_DROP, {"keys": sorted(keys)})


def forget(tx: Connection, ids: Collection[str]) -> None:
    """Remove the keys of runs that are purged in this transaction."""
    found = list(tx.execute(_OF_RUNS, {"ids": list(ids)}).scalars()) if ids else []
    # Locked by the key, as by everybody else; what was given to another run in between stays.
    keys = [row.key for row in tx.execute(_LOCK, {"keys": found}) if row.run_id in ids] if found else []
    if keys:
        tx.execute(_FORGET, {"keys": keys})
