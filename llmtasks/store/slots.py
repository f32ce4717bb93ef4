"""Slots: the max_instances places of a task function or schedule. The primary key (scope, place) is what keeps the limit."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, and_, bindparam, delete, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from llmtasks.states import RunState
from llmtasks.store import outbox
from llmtasks.store.rows import runs, slots

#: How many waiting runs are looked at for one freed slot; those before it in line lack another slot.
CANDIDATES: Final = 20

_TAKEN: Final = select(slots.c.place, slots.c.run_id).where(slots.c.scope == bindparam("scope"))
_FREE: Final = delete(slots).where(slots.c.run_id == bindparam("run_id"))


def _put(dialect: str) -> Any:
    kind = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect]
    return (
        kind(slots).values({column.name: bindparam(column.name) for column in slots.columns}).on_conflict_do_nothing()
    )


_PUT: Final = {dialect: _put(dialect) for dialect in ("sqlite", "postgresql")}


def scopes(
    app: str, func_name: str, function_slots: int | None, schedule_id: str | None, schedule_slots: int | None
) -> list[tuple[str, int]]:
    """The scopes that limit a run, with their numbers of places; the function's first, so that everyone locks in one order."""
    found: list[tuple[str, int]] = []
    if function_slots is not None:
        found.append((f"function:{app}:{func_name}", function_slots))
    if schedule_id is not None and schedule_slots is not None:
        found.append((f"schedule:{schedule_id}", schedule_slots))
    return found


def take(tx: Connection, wanted: list[tuple[str, int]], run_id: str, now: datetime) -> str | None:
    """Take a place in every scope for a run, or in none.

    Returns:
        None when it has them all, else the scope that had no free place.
    """
    for scope, places in wanted:
        if not _take_one(tx, scope, places, run_id, now):
            tx.execute(_FREE, {"run_id": run_id})
            return scope
    return None


def free(tx: Connection, run_id: str, now: datetime) -> list[str]:
    """Give back what a run holds and hand it to the first runs that wait; returns their ids, now pending."""
    scopes_held = [row.scope for row in tx.execute(select(slots.c.scope).where(slots.c.run_id == run_id))]
    if not scopes_held:
        return []
    tx.execute(_FREE, {"run_id": run_id})
    handed: list[str] = []
    for scope in scopes_held:
        handed += hand_over(tx, scope, now)
    return handed


def hand_over(tx: Connection, scope: str, now: datetime, limit: int = 1) -> list[str]:
    """Let up to ``limit`` waiting runs of a scope have its free places, by priority, then age; returns their ids."""
    kind, _, rest = scope.partition(":")
    if kind == "schedule":
        condition = runs.c.schedule_id == rest
    else:
        app, _, func_name = rest.partition(":")
        condition = and_(runs.c.app == app, runs.c.func_name == func_name, runs.c.function_slots.is_not(None))
    waiting = tx.execute(
        select(
            runs.c.id, runs.c.app, runs.c.func_name, runs.c.function_slots, runs.c.schedule_id, runs.c.schedule_slots
        )
        .where(condition, ~runs.c.delivered, runs.c.state == RunState.WAITING)
        .order_by(runs.c.priority, runs.c.created_at)
        .limit(max(CANDIDATES, limit))
        .with_for_update(skip_locked=True)
    ).all()
    handed: list[str] = []
    for row in waiting:
        wanted = scopes(row.app, row.func_name, row.function_slots, row.schedule_id, row.schedule_slots)
        full = take(tx, wanted, row.id, now)
        if full is None:
            tx.execute(update(runs).where(runs.c.id == row.id).values(state=RunState.PENDING, reason=None))
            outbox.put(tx, row.app, [row.id], now)
            handed.append(row.id)
            if len(handed) == limit:
                break
        elif full == scope:
            break
    return handed


def waiting_scopes(tx: Connection, app: str) -> list[str]:
    """The scopes for which runs of an app wait, so that a keeper can look for places that nobody handed over."""
    rows = tx.execute(
        select(runs.c.func_name, runs.c.function_slots, runs.c.schedule_id, runs.c.schedule_slots)
        .where(runs.c.app == app, ~runs.c.delivered, runs.c.state == RunState.WAITING)
        .distinct()
    )
    found: dict[str, None] = {}
    for row in rows:
        for scope, _ in scopes(app, row.func_name, row.function_slots, row.schedule_id, row.schedule_slots):
            found[scope] = None
    return list(found)


def free_abandoned(tx: Connection) -> int:
    """Free places whose run is gone or over; none should be, so this only mends what a bug or a hand left behind."""
    live = select(runs.c.id).where(
        or_(runs.c.state == RunState.RUNNING, runs.c.state.in_([RunState.PENDING, RunState.QUEUED]))
    )
    return tx.execute(delete(slots).where(slots.c.run_id.not_in(live))).rowcount


def _take_one(tx: Connection, scope: str, places: int, run_id: str, now: datetime) -> bool:
    """Try the free places in turn; where another transaction is quicker the key refuses ours."""
    taken = {row.place: row.run_id for row in tx.execute(_TAKEN, {"scope": scope})}
    if run_id in taken.values():
        return True
    for place in range(places):
        if place in taken:
            continue
        row = {"scope": scope, "place": place, "run_id": run_id, "taken_at": now}
        if tx.execute(_PUT[tx.dialect.name], row).rowcount == 1:
            return True
    return False
