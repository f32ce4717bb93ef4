"""Slots: the max_instances places of a task function or schedule; the primary key (scope, place) keeps the limit."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, bindparam, delete, select, update

from llmtasks.states import RunState
from llmtasks.store import outbox, pauses
from llmtasks.store.dialects import PerDialect, insert_if_new
from llmtasks.store.rows import runs, slots

#: How many waiting runs are looked at for one freed slot; those before it in line lack another slot.
CANDIDATES: Final = 20

_TAKEN: Final = select(slots.c.place, slots.c.run_id).where(slots.c.scope == bindparam("scope"))
_FREE: Final = delete(slots).where(slots.c.run_id == bindparam("run_id"))


_HELD: Final = select(slots.c.scope).where(slots.c.run_id == bindparam("run_id"))
_ROW: Final[dict[str, Any]] = {column.name: bindparam(column.name) for column in slots.columns}
_PUT: Final = PerDialect(lambda dialect: insert_if_new(slots, dialect).values(_ROW))
#: Waiting runs of a scope, in line.
_WAITING: Final = (
    select(runs.c.id, runs.c.app, runs.c.func_name, runs.c.function_slots, runs.c.schedule_id, runs.c.schedule_slots)
    .where(~runs.c.delivered, runs.c.state == RunState.WAITING, ~pauses.IS_PAUSED)
    # Backfilled runs are many and were created together: they let others pass, and go by their instants.
    .order_by(runs.c.priority, runs.c.backfilled, runs.c.created_at, runs.c.scheduled_for, runs.c.id)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)
_WAITING_FOR_SCHEDULE: Final = _WAITING.where(runs.c.schedule_id == bindparam("of_schedule"))
_WAITING_FOR_FUNCTION: Final = _WAITING.where(
    runs.c.app == bindparam("of_app"), runs.c.func_name == bindparam("of_function"), runs.c.function_slots.is_not(None)
)
_GO: Final = update(runs).where(runs.c.id == bindparam("run_id")).values(state=RunState.PENDING, reason=None)


def scopes(
    app: str, func_name: str, function_slots: int | None, schedule_id: str | None, schedule_slots: int | None
) -> list[tuple[str, int]]:
    """The scopes that limit a run, with their numbers of places.

    The function's comes first, so that everyone locks in one order.
    """
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
    return free_all(tx, [run_id], now)


def free_all(tx: Connection, ids: list[str], now: datetime) -> list[str]:
    """Give back what several runs hold, scope by scope in one order; returns the ids of those that got the places."""
    freed: Counter[str] = Counter()
    for run_id in ids:
        held = tx.execute(_HELD, {"run_id": run_id}).scalars().all()
        if held:
            tx.execute(_FREE, {"run_id": run_id})
            freed.update(held)
    return [run_id for scope in sorted(freed) for run_id in hand_over(tx, scope, now, freed[scope])]


def hand_over(tx: Connection, scope: str, now: datetime, limit: int = 1) -> list[str]:
    """Let up to ``limit`` waiting runs of a scope have its free places, by priority, then age; returns their ids."""
    kind, _, rest = scope.partition(":")
    many = {"limit": max(CANDIDATES, limit)}
    if kind == "schedule":
        waiting = tx.execute(_WAITING_FOR_SCHEDULE, {**many, "of_schedule": rest}).all()
    else:
        app, _, func_name = rest.partition(":")
        waiting = tx.execute(_WAITING_FOR_FUNCTION, {**many, "of_app": app, "of_function": func_name}).all()
    handed: list[str] = []
    for row in waiting:
        wanted = scopes(row.app, row.func_name, row.function_slots, row.schedule_id, row.schedule_slots)
        full = take(tx, wanted, row.id, now)
        if full is None:
            tx.execute(_GO, {"run_id": row.id})
            outbox.put(tx, row.app, [row.id], now)
            handed.append(row.id)
            if len(handed) == limit:
                break
        elif full == scope:
            break
    return handed


def waiting_scopes(tx: Connection, app: str) -> list[str]:
    """The scopes for which runs of an app wait, in order, so that a keeper can hand over places that nobody did."""
    rows = tx.execute(
        select(runs.c.func_name, runs.c.function_slots, runs.c.schedule_id, runs.c.schedule_slots)
        .where(runs.c.app == app, ~runs.c.delivered, runs.c.state == RunState.WAITING, ~pauses.IS_PAUSED)
        .distinct()
    )
    found: set[str] = set()
    for row in rows:
        found |= {
            name for name, _ in scopes(app, row.func_name, row.function_slots, row.schedule_id, row.schedule_slots)
        }
    return sorted(found)


def _take_one(tx: Connection, scope: str, places: int, run_id: str, now: datetime) -> bool:
    """Try the free places in turn; where another transaction is quicker the key refuses ours."""
    taken = {row.place: row.run_id for row in tx.execute(_TAKEN, {"scope": scope})}
    if run_id in taken.values():
        return True
    # No more than there are left: after a lower limit runs still hold places beyond it, which count as well.
    open_places = [place for place in range(places) if place not in taken][: max(0, places - len(taken))]
    for place in open_places:
        row = {"scope": scope, "place": place, "run_id": run_id, "taken_at": now}
        if tx.execute(_PUT[tx.dialect.name], row).rowcount == 1:
            return True
    return False
