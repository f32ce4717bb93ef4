"""Pauses: the functions of which no attempt starts, and the queues that no worker consumes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, bindparam, delete, exists, select, update

from llmtasks.states import PauseKind, RunState
from llmtasks.store import outbox
from llmtasks.store.dialects import PerDialect, insert_if_new
from llmtasks.store.rows import pauses, runs, values_of
from llmtasks.wording import utc


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """A function or a queue that is paused in an app.

    Attributes:
        kind: Which of the two.
        name: Its name.
        paused_at: Since when.
        paused_by: Who wanted it.
        reason: Why.
    """

    kind: PauseKind
    name: str
    paused_at: datetime
    paused_by: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        by = f" by {self.paused_by}" if self.paused_by else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.kind} {self.name!r} is paused{by} since {utc(self.paused_at)}{why}"


_KEY: Final = (
    pauses.c.app == bindparam("of_app"),
    pauses.c.kind == bindparam("of_kind"),
    pauses.c.name == bindparam("of_name"),
)
_COLUMNS: Final = [pauses.c[name] for name in Pause.__dataclass_fields__]
_ALL: Final = select(*_COLUMNS).where(pauses.c.app == bindparam("of_app")).order_by(pauses.c.kind, pauses.c.name)
_ONE: Final = select(*_COLUMNS).where(*_KEY)
_DELETE: Final = delete(pauses).where(*_KEY)
_ROW: Final[dict[str, Any]] = {column.name: bindparam(column.name) for column in pauses.columns}
_PUT: Final = PerDialect(lambda dialect: insert_if_new(pauses, dialect).values(_ROW))
#: Whether a run's function is paused.
IS_PAUSED: Final = exists().where(
    pauses.c.app == runs.c.app, pauses.c.kind == PauseKind.FUNCTION, pauses.c.name == runs.c.func_name
)
#: Runs that wait for no slot: their function was paused, and is not any more.
_RESUMED: Final = (
    select(runs.c.id)
    .where(
        runs.c.app == bindparam("of_app"),
        ~runs.c.delivered,
        runs.c.state == RunState.WAITING,
        runs.c.function_slots.is_(None),
        runs.c.schedule_slots.is_(None),
        ~IS_PAUSED,
    )
    .order_by(runs.c.priority, runs.c.backfilled, runs.c.created_at, runs.c.scheduled_for, runs.c.id)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)


def put(tx: Connection, app: str, pause: Pause) -> Pause:
    """Record a pause; what is paused already stays as it was. Returns what is recorded."""
    row = {"app": app, **{name: getattr(pause, name) for name in Pause.__dataclass_fields__}}
    tx.execute(_PUT[tx.dialect.name], row)
    return get(tx, app, pause.kind, pause.name) or pause


def remove(tx: Connection, app: str, kind: PauseKind, name: str) -> Pause | None:
    """End a pause; returns it, or None where there was none."""
    found = get(tx, app, kind, name)
    tx.execute(_DELETE, {"of_app": app, "of_kind": kind, "of_name": name})
    return found


def get(tx: Connection, app: str, kind: PauseKind, name: str) -> Pause | None:
    """The pause of a function or a queue; None where it is not paused."""
    row = tx.execute(_ONE, {"of_app": app, "of_kind": kind, "of_name": name}).mappings().one_or_none()
    return None if row is None else _pause(row)


def find(tx: Connection, app: str) -> list[Pause]:
    """What is paused in an app, by kind and name."""
    return [_pause(row) for row in tx.execute(_ALL, {"of_app": app}).mappings()]


def release(tx: Connection, app: str, now: datetime, limit: int) -> list[str]:
    """Let up to ``limit`` runs go on that waited for their function alone, by priority, then age; returns their ids."""
    ids = list(tx.execute(_RESUMED, {"of_app": app, "limit": limit}).scalars())
    if ids:
        tx.execute(update(runs).where(runs.c.id.in_(ids)).values(state=RunState.PENDING, reason=None))
        outbox.put(tx, app, ids, now)
    return ids


def _pause(row: Any) -> Pause:
    values = values_of(row)
    values["kind"] = PauseKind(values["kind"])
    return Pause(**values)
