"""What keepers write: lost runs, due retries, ends to deliver, messages to send again; all of it safe to do twice."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, exists, literal, null, or_, select, update

from llmtasks.message import DELIVER
from llmtasks.states import ENDED, RunState
from llmtasks.store import outbox, pauses, slots
from llmtasks.store.columns import UtcDateTime
from llmtasks.store.rows import runs, state_in, values_of

#: Rows that one keeper takes in one transaction.
BATCH: Final = 200
#: An end sent for delivery is sent again after this time, then after twice as long, and so on.
DELIVERY_PATIENCE: Final = timedelta(seconds=10)
#: How often that time doubles at most: to ten minutes and a bit.
DELIVERY_DOUBLINGS: Final = 6
#: The first republication of a queued run is after this time, the next after twice as long, and so on.
REPUBLISH_AFTER: Final = timedelta(minutes=10)
#: A queued run whose queue is empty is published again when queued for longer than this.
EMPTY_QUEUE_PATIENCE: Final = timedelta(seconds=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Which of a keeper's steps may find something: most rounds find nothing, and a look is cheap."""

    lost: bool
    retries: bool
    waiting: bool
    untold: bool


_OPEN: Final = and_(runs.c.app == bindparam("of_app"), ~runs.c.delivered)
_WORK: Final = select(
    exists()
    .where(_OPEN, runs.c.state == RunState.RUNNING, runs.c.heartbeat_at < bindparam("silent_since"))
    .label("lost"),
    exists()
    .where(_OPEN, runs.c.state == RunState.RETRYING, runs.c.next_attempt_at <= bindparam("now"))
    .label("retries"),
    exists().where(_OPEN, runs.c.state == RunState.WAITING).label("waiting"),
    exists()
    .where(
        _OPEN,
        state_in(ENDED),
        runs.c.func_name != "",
        or_(runs.c.owner.is_(None), runs.c.heartbeat_at < bindparam("silent_since")),
    )
    .label("untold"),
)


def work(tx: Connection, app: str, silent_since: datetime, now: datetime) -> Work:
    """What a keeper has to do now."""
    found = tx.execute(_WORK, {"of_app": app, "silent_since": silent_since, "now": now}).mappings().one()
    return Work(**{name: bool(value) for name, value in values_of(found).items()})


def lose_silent(tx: Connection, app: str, silent_since: datetime, now: datetime, failure: str) -> list[str]:
    """End the attempts of runs whose owner has not stamped them since; returns the ids of those to publish.

    Args:
        failure: The error, packed as Celery's backends keep it, for the runs that have no attempt left.
    """
    return lose(
        tx,
        and_(runs.c.app == app, ~runs.c.delivered, runs.c.heartbeat_at < silent_since),
        now,
        error="WorkerLostError: the worker that held the run stopped answering",
        failure=failure,
    )


def lose(
    tx: Connection,
    condition: ColumnElement[bool],
    now: datetime,
    *,
    error: str,
    failure: str,
    delay: timedelta | None = None,
) -> list[str]:
    """End running attempts that died without a word.

    Each counts. A run with attempts left is pending again (or ``retrying`` for ``delay``), one with a cancel request is
    cancelled, the others have failed.

    Returns:
        The ids of the runs whose messages are to be published now.
    """
    lost = list(
        tx.execute(
            select(runs.c.id)
            .where(condition, runs.c.state == RunState.RUNNING)
            .order_by(runs.c.id)
            .limit(BATCH)
            .with_for_update(skip_locked=True)
        ).scalars()
    )
    if not lost:
        return []
    these = and_(runs.c.id.in_(lost), runs.c.state == RunState.RUNNING)
    asked = runs.c.cancel_requested_at.is_not(None)
    last = and_(runs.c.max_retries.is_not(None), runs.c.attempts >= runs.c.max_retries)
    again = RunState.PENDING if delay is None else RunState.RETRYING
    tx.execute(
        update(runs)
        .where(these)
        .ordered_values(
            (runs.c.state, case((asked, RunState.CANCELLED.value), (last, RunState.FAILED.value), else_=again.value)),
            (runs.c.ended_at, case((or_(asked, last), literal(now, UtcDateTime())), else_=null())),
            # After what looks at it: MariaDB sets one column after the other.
            (runs.c.attempts, runs.c.attempts + 1),
            (runs.c.losses, runs.c.losses + 1),
            (runs.c.owner, None),
            (runs.c.heartbeat_at, None),
            (runs.c.next_attempt_at, None if delay is None else now + delay),
            (runs.c.error, error),
            (runs.c.failure, failure),
            (runs.c.reason, case((asked, runs.c.reason), else_=error)),
            (runs.c.delivered, False),
        )
    )
    rows = tx.execute(select(runs.c.id, runs.c.app, runs.c.state).where(runs.c.id.in_(lost))).all()
    handed = slots.free_all(tx, [row.id for row in rows], now)
    pending = [row.id for row in rows if row.state == RunState.PENDING]
    if pending:
        outbox.put(tx, rows[0].app, pending, now)
    return pending + handed


def start_retries(tx: Connection, app: str, now: datetime) -> list[str]:
    """Move the runs whose next attempt is due to the outbox; returns their ids."""
    due = list(
        tx.execute(
            select(runs.c.id)
            .where(
                runs.c.app == app, ~runs.c.delivered, runs.c.state == RunState.RETRYING, runs.c.next_attempt_at <= now
            )
            .order_by(runs.c.next_attempt_at)
            .limit(BATCH)
            .with_for_update(skip_locked=True)
        ).scalars()
    )
    if due:
        tx.execute(
            update(runs)
            .where(runs.c.id.in_(due), runs.c.state == RunState.RETRYING)
            .values(state=RunState.PENDING, next_attempt_at=None)
        )
        outbox.put(tx, app, due, now)
    return due


def promote(tx: Connection, app: str, now: datetime) -> list[str]:
    """Let waiting runs go on that got a free slot, or whose function is not paused any more; returns their ids."""
    handed = pauses.release(tx, app, now, BATCH)
    for scope in slots.waiting_scopes(tx, app):
        handed += slots.hand_over(tx, scope, now, limit=BATCH)
    return handed


def send_ends(tx: Connection, app: str, silent_since: datetime, now: datetime) -> list[str]:
    """Put the ends that Celery was not told, and that nobody holds, into the outbox; returns their ids."""
    untold = list(
        tx.execute(
            select(runs.c.id)
            .where(
                runs.c.app == app,
                ~runs.c.delivered,
                runs.c.state.in_(ENDED),
                runs.c.func_name != "",
                or_(runs.c.owner.is_(None), runs.c.heartbeat_at < silent_since),
                or_(runs.c.delivery_sent_at.is_(None), _patience_is_over(now)),
            )
            .order_by(runs.c.ended_at)
            .limit(BATCH)
            .with_for_update(skip_locked=True)
        ).scalars()
    )
    if untold:
        # From the first time on, what is counted are the publications of the end.
        told_before = case((runs.c.delivery_sent_at.is_(None), 0), else_=runs.c.publications)
        sent = [(runs.c.publications, told_before), (runs.c.delivery_sent_at, now)]
        tx.execute(update(runs).where(runs.c.id.in_(untold)).ordered_values(*sent))
        outbox.put(tx, app, untold, now, DELIVER)
    return untold


def _patience_is_over(now: datetime) -> ColumnElement[bool]:
    """Whether an end sent before is to be sent again: twice as long after each time that the broker took it."""
    steps = range(DELIVERY_DOUBLINGS + 1)
    return or_(
        *(
            and_(runs.c.publications <= step + 1, runs.c.delivery_sent_at < now - DELIVERY_PATIENCE * 2**step)
            for step in steps
        ),
        runs.c.delivery_sent_at < now - DELIVERY_PATIENCE * 2**DELIVERY_DOUBLINGS,
    )


def queued_long(tx: Connection, app: str, now: datetime) -> list[tuple[str, str, str | None, bool]]:
    """Queued runs that the broker may have lost: id, function, queue, and whether to send it without a look there."""
    rows = tx.execute(
        select(runs.c.id, runs.c.func_name, runs.c.queue, runs.c.published_at, runs.c.publications)
        .where(
            runs.c.app == app,
            ~runs.c.delivered,
            runs.c.state == RunState.QUEUED,
            runs.c.published_at < now - EMPTY_QUEUE_PATIENCE,
            or_(runs.c.envelope.is_not(None), runs.c.replacement.is_not(None)),
        )
        .order_by(runs.c.published_at)
        .limit(BATCH)
    )
    return [
        (row.id, row.func_name, row.queue, row.published_at < now - _republish_after(row.publications)) for row in rows
    ]


def _republish_after(publications: int) -> timedelta:
    doubled: int = 2 ** min(max(publications, 1) - 1, 10)
    return REPUBLISH_AFTER * doubled


def republish(tx: Connection, app: str, ids: list[str], now: datetime) -> None:
    """Owe the broker the messages of queued runs again; the attempt they carry is the same."""
    queued = select(runs.c.id).where(runs.c.id.in_(ids), runs.c.state == RunState.QUEUED)
    still = list(tx.execute(queued.order_by(runs.c.id).with_for_update(skip_locked=True)).scalars())
    if still:
        tx.execute(update(runs).where(runs.c.id.in_(still)).values(state=RunState.PENDING))
        outbox.put(tx, app, still, now)


def owned_by(owner: str, run_id: str) -> ColumnElement[bool]:
    """The condition that names the running attempt of one run of one process."""
    return and_(runs.c.id == run_id, runs.c.owner == owner)


def release(tx: Connection, owner: str, run_id: str, now: datetime) -> tuple[bool, list[str]]:
    """Give up a running attempt without counting it: the broker gives the message back, or a keeper sends it again.

    Returns:
        Whether the run was that owner's, and the ids of the runs that got its slots.
    """
    moved = tx.execute(
        update(runs)
        .where(owned_by(owner, run_id), runs.c.state == RunState.RUNNING)
        .values(state=RunState.QUEUED, owner=None, heartbeat_at=None, published_at=now)
    ).rowcount
    return (True, slots.free(tx, run_id, now)) if moved else (False, [])


def abandon_end(tx: Connection, owner: str, run_id: str) -> None:
    """An owner died after its run ended and before Celery was told: nobody holds it now."""
    tx.execute(update(runs).where(owned_by(owner, run_id), runs.c.state.in_(ENDED)).values(owner=None))


def state_of(tx: Connection, run_id: str) -> RunState | None:
    """The state of a run; None where the ledger does not know it."""
    found = tx.execute(select(runs.c.state).where(runs.c.id == run_id)).scalar()
    return RunState(found) if found else None
