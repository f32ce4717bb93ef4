"""The outbox: messages that are owed to the broker. Taking one reserves it for a while; publishing removes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, delete, exists, select, update

from llmtasks.message import DELIVER, RUN, Message
from llmtasks.states import RunState
from llmtasks.store.batches import insertion
from llmtasks.store.dialects import PerDialect, among, by_index, insert_or_change
from llmtasks.store.rows import outbox, runs, values_of

_ROW: Final[dict[str, Any]] = {column.name: bindparam(column.name) for column in outbox.columns}
_PUT_NEW: Final = insertion(outbox, list(_ROW))
_PUT: Final = PerDialect(
    lambda dialect: insert_or_change(outbox, dialect, "run_id", ["kind", "available_at"]).values(_ROW)
)
_MESSAGE: Final = (
    outbox.c.run_id, outbox.c.kind, outbox.c.app, runs.c.func_name, runs.c.args, runs.c.kwargs, runs.c.envelope,
    runs.c.queue, runs.c.priority, runs.c.attempts, runs.c.replacement, runs.c.schedule_id,
)  # fmt: skip
_DUE: Final = by_index(
    select(outbox.c.run_id)
    .where(outbox.c.app == bindparam("app"), outbox.c.available_at <= bindparam("now"))
    .order_by(outbox.c.available_at)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True),
    outbox,
    "ix_llmtasks_outbox_available",
)
_THESE: Final = (
    select(*_MESSAGE)
    .join(runs, runs.c.id == outbox.c.run_id)
    .where(outbox.c.run_id.in_(bindparam("ids", expanding=True)))
)
_RESERVE: Final = (
    update(outbox).where(outbox.c.run_id.in_(bindparam("ids", expanding=True))).values(available_at=bindparam("until"))
)
_UNOWED: Final = select(runs.c.id).where(
    runs.c.id.in_(bindparam("ids", expanding=True)),
    runs.c.state == RunState.PENDING,
    runs.c.publications == 0,
    ~exists().where(outbox.c.run_id == runs.c.id),
)
_REMOVE: Final = delete(outbox).where(outbox.c.run_id.in_(bindparam("ids", expanding=True)))


def _still_taken(dialect: str) -> ColumnElement[bool]:
    return and_(among(outbox.c.run_id, "ids", dialect), outbox.c.available_at == bindparam("until"))


_TAKE_OUT: Final = PerDialect(lambda dialect: delete(outbox).where(_still_taken(dialect)).returning(outbox.c.run_id))
#: Together with ``_REMOVE`` the same where DELETE returns nothing, which is MySQL.
_LOCK_TAKEN: Final = PerDialect(lambda dialect: select(outbox.c.run_id).where(_still_taken(dialect)).with_for_update())
#: Everybody locks runs before their outbox rows, several of them by id: no two transactions wait for each other.
_LOCK: Final = PerDialect(
    lambda dialect: select(runs.c.id).where(among(runs.c.id, "ids", dialect)).order_by(runs.c.id).with_for_update()
)
_PUBLISHED: Final = PerDialect(
    lambda dialect: (
        update(runs)
        .where(among(runs.c.id, "ids", dialect))
        .values(
            state=case((runs.c.state == RunState.PENDING, RunState.QUEUED.value), else_=runs.c.state),
            published_at=bindparam("now"),
            publications=runs.c.publications + 1,
        )
    )
)
_WAITING: Final = (
    select(outbox.c.run_id).where(outbox.c.app == bindparam("app"), outbox.c.available_at <= bindparam("now")).limit(1)
)


def put(tx: Connection, app: str, ids: Iterable[str], available_at: datetime, kind: str = RUN) -> None:
    """Owe the broker a message for each run; a run that has one keeps one, with the new kind and time."""
    rows = [{"run_id": run_id, "app": app, "kind": kind, "available_at": available_at} for run_id in sorted(ids)]
    if rows:
        tx.execute(_PUT[tx.dialect.name], rows)


def put_new(tx: Connection, app: str, times: Mapping[str, datetime]) -> None:
    """Owe the broker the messages of runs that this transaction opened, each at its own time."""
    rows = [{"run_id": run_id, "app": app, "kind": RUN, "available_at": at} for run_id, at in times.items()]
    _PUT_NEW.run(tx, rows)


def unowed(tx: Connection, ids: list[str]) -> set[str]:
    """Those of these runs that are pending, were never published, and for which no message is owed."""
    return set(tx.execute(_UNOWED, {"ids": ids}).scalars())


def is_due(tx: Connection, app: str, now: datetime) -> bool:
    """Whether any message waits to be published."""
    return tx.execute(_WAITING, {"app": app, "now": now}).first() is not None


def take_due(tx: Connection, app: str, now: datetime, until: datetime, limit: int) -> list[Message]:
    """Reserve up to ``limit`` due messages until ``until``; others reserved at the same moment are passed over."""
    ids = list(tx.execute(_DUE, {"app": app, "now": now, "limit": limit}).scalars())
    return take_these(tx, ids, until) if ids else []


def take_these(tx: Connection, ids: list[str], until: datetime) -> list[Message]:
    """Reserve the messages of these runs until ``until``, in the transaction that made them."""
    rows = tx.execute(_THESE, {"ids": ids}).mappings()
    found = {row["run_id"]: Message(**values_of(row), reserved_until=until) for row in rows}
    if found:
        tx.execute(_RESERVE, {"ids": list(found), "until": until})
    return [found[run_id] for run_id in ids if run_id in found]


def published(tx: Connection, messages: list[Message], now: datetime) -> None:
    """The broker has these messages. One that was put into the outbox again since it was taken stays there."""
    if messages and tx.dialect.name != "sqlite":  # a SQLite transaction has the whole database
        tx.execute(_LOCK[tx.dialect.name], {"ids": [item.run_id for item in messages]}).all()
    for until in {item.reserved_until for item in messages}:
        ids = [item.run_id for item in messages if item.reserved_until == until]
        sent = _take_out(tx, ids, until)
        if sent:
            tx.execute(_PUBLISHED[tx.dialect.name], {"ids": sent, "now": now})


def put_pending(tx: Connection, run_id: str, now: datetime) -> None:
    """Owe the broker a message for this run if it is pending."""
    app = tx.execute(select(runs.c.app).where(runs.c.id == run_id, runs.c.state == RunState.PENDING)).scalar()
    if app is not None:
        put(tx, app, [run_id], now)


def take_back(tx: Connection, message: Message) -> bool:
    """Owe nothing for a taken message any more; says no where it was put into the outbox again since."""
    return bool(_take_out(tx, [message.run_id], message.reserved_until))


def deliver(tx: Connection, app: str, run_id: str, now: datetime) -> None:
    """Owe the broker the message that tells a run's end."""
    tx.execute(update(runs).where(runs.c.id == run_id).values(delivery_sent_at=now, publications=0))
    put(tx, app, [run_id], now, DELIVER)


def requeue(tx: Connection, app: str, run_id: str, now: datetime, until: datetime) -> list[Message]:
    """Owe the broker the message of a run that was released, and reserve it for the caller."""
    tx.execute(update(runs).where(runs.c.id == run_id, runs.c.state == RunState.QUEUED).values(state=RunState.PENDING))
    put(tx, app, [run_id], now)
    return take_these(tx, [run_id], until)


def remove(tx: Connection, ids: list[str]) -> None:
    """Nothing is owed for these runs any more."""
    if ids:
        tx.execute(_REMOVE, {"ids": ids})


def _take_out(tx: Connection, ids: list[str], until: datetime) -> list[str]:
    """Remove those of these messages that are still reserved until ``until``; returns their ids."""
    taken = {"ids": ids, "until": until}
    if tx.dialect.delete_returning:
        return list(tx.execute(_TAKE_OUT[tx.dialect.name], taken).scalars())
    unchanged = list(tx.execute(_LOCK_TAKEN[tx.dialect.name], taken).scalars())
    remove(tx, unchanged)
    return unchanged
