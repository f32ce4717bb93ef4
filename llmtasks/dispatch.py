"""Dispatch: one transaction for the run and its outbox row, then the message; beat, execute_now, command line alike.

What this process cannot publish stays in the outbox, and any keeper publishes it after ``outbox_patience`` seconds.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from llmtasks import sender
from llmtasks.errors import BrokerUnavailableError, ConfigurationError, DatabaseUnavailableError, RunNotFoundError
from llmtasks.message import Message
from llmtasks.options import DEFAULT_PRIORITY, limits
from llmtasks.policies import places_of
from llmtasks.settings import Settings
from llmtasks.store import cancelling, outbox, runs, uniqueness, unsendable
from llmtasks.store.database import Database, database_at
from llmtasks.store.forking import fork_gate
from llmtasks.store.runs import NewRun, Run
from llmtasks.store.schedules import Schedule
from llmtasks.store.uniqueness import Accepted
from llmtasks.uniqueness import Unique

logger = logging.getLogger(__name__)

#: Instants of schedules get their run's id from this namespace, so that the same instant is the same run on every beat.
RUN_NAMESPACE = uuid.UUID("5f3c9a54-6b0e-4a53-9b52-6d9f2d7e0a11")


@dataclass(frozen=True, slots=True, eq=False)
class Station:
    """What a process needs to work for one app: Celery, the settings, the database."""

    app: Any
    settings: Settings
    database: Database

    @property
    def name(self) -> str:
        """The app's name in every row."""
        return self.settings.app


_stations: WeakKeyDictionary[Any, Station] = WeakKeyDictionary()


def station(app: Any = None) -> Station:
    """The Station of an app, or of the current one; the same object each time."""
    app = app or sender.current_app()
    found = _stations.get(app)
    if found is None:
        settings = sender.settings_of(app)
        found = _stations.setdefault(app, Station(app, settings, database_at(settings.database_url)))
    return found


def run_id_of(schedule_id: str, scheduled_for: datetime) -> str:
    """The id of the run of one instant of one schedule."""
    return str(uuid.uuid5(RUN_NAMESPACE, f"{schedule_id}@{scheduled_for.isoformat()}"))


def run_of(
    schedule: Schedule,
    *,
    run_id: str | None = None,
    scheduled_for: datetime | None = None,
    stands_for: int = 1,
    backfilled: bool = False,
    reason: str | None = None,
    unique: Unique | None = None,
) -> NewRun:
    """The run that a schedule's instant (or somebody's hand, without one) opens."""
    options = schedule.options
    own, timeout, expires = options.get("celery"), options.get("timeout"), options.get("expires")
    envelope = _envelope(timeout, expires, schedule.handed, own) if own else _shared(timeout, expires, schedule.handed)
    if run_id is None:
        run_id = run_id_of(schedule.id, scheduled_for) if scheduled_for else str(uuid.uuid4())
    return NewRun(
        id=run_id,
        app=schedule.app,
        func_name=schedule.func_name,
        name=schedule.name,
        args=sender.dumps(schedule.args, "args"),
        kwargs=sender.dumps(schedule.kwargs, "params"),
        envelope=envelope,
        queue=options.get("queue"),
        priority=options.get("priority") or DEFAULT_PRIORITY,
        schedule_id=schedule.id,
        scheduled_for=scheduled_for,
        schedule_slots=None if schedule.handed else places_of(options, backfilled=backfilled),
        max_retries=options.get("max_retries"),
        stands_for=stands_for,
        backfilled=backfilled,
        reason=reason,
        unique=unique,
    )


def _envelope(timeout: float | None, expires: Any, handed: bool, own: Mapping[str, Any]) -> str:
    soft, hard = limits(timeout) if timeout is not None else (None, None)
    common = {"soft_time_limit": soft, "time_limit": hard, "expires": expires}
    return sender.envelope_of_options({**common, **own, "handed": handed})


@lru_cache(maxsize=256)
def _shared(timeout: float | None, expires: Any, handed: bool) -> str:
    """The envelope of schedules without Celery's own options: few differ."""
    return _envelope(timeout, expires, handed, {})


def dispatch(at: Station, new: NewRun, available_at: datetime | None = None) -> Run:
    """Record a run, then send its message; a broker that is away only delays it.

    Args:
        at: Where.
        new: The run.
        available_at: Its message is sent at this instant; None sends it now.

    Returns:
        The run as the ledger has it; where it would be a duplicate, the one that is there.

    Raises:
        DatabaseUnavailableError: Nothing was recorded.
        DuplicateRunError: Its function is unique and refuses a second run.
    """
    return accept(at, new, available_at).run


def accept(
    at: Station, new: NewRun, available_at: datetime | None = None, *, traced: bool = False, refuses: bool = True
) -> Accepted:
    """As ``dispatch``, and say more.

    Args:
        at: Where.
        new: The run.
        available_at: Its message is sent at this instant; None sends it now.
        traced: Somebody knows its id: a duplicate is recorded as skipped, and its end is told.
        refuses: Whether a duplicate may raise.
    """
    now = at.database.now()
    messages: list[Message] = []
    with at.database.transaction() as tx:
        accepted = uniqueness.open_run(tx, new, now, available_at, refuses=refuses)
        if accepted.is_duplicate and traced:
            uniqueness.record_duplicate(tx, new, accepted.run, now)
        if accepted.is_new and (available_at is None or available_at <= now):
            messages = outbox.take_these(tx, [new.id], _until(at, now))
    announce_cancelled(at, accepted.cancelled)
    send(at, messages)
    return accepted


def relay(at: Station, ids: Iterable[str]) -> None:
    """Send the messages of runs that a transaction just put into the outbox, or leave them to a keeper."""
    ids = list(ids)
    if not ids:
        return
    try:
        now = at.database.now()
        with at.database.transaction() as tx:
            messages = outbox.take_these(tx, ids, _until(at, now))
    except DatabaseUnavailableError as error:
        logger.warning("not published yet, the outbox keeps it: %s", error)
        return
    send(at, messages)


def relay_due(at: Station, limit: int = 500) -> int:
    """Send what is due in the outbox and nobody else is sending; returns how many messages there were.

    Raises:
        BrokerUnavailableError: The broker does not answer; the messages stay.
    """
    now = at.database.now()
    with at.database.reading() as connection:
        if not outbox.is_due(connection, at.name, now):
            return 0
    with at.database.transaction() as tx:
        messages = outbox.take_due(tx, at.name, now, _until(at, now), limit)
    publish(at, messages)
    return len(messages)


def send(at: Station, messages: list[Message]) -> bool:
    """Publish messages of ours; where the broker or the database is away, leave them to a keeper and say so."""
    try:
        publish(at, messages)
    except (BrokerUnavailableError, DatabaseUnavailableError) as error:
        logger.warning("not published yet, the outbox keeps it: %s", error, extra={"messages": len(messages)})
        return False
    return True


def publish(at: Station, messages: list[Message]) -> None:
    """Publish reserved messages and take them out of the outbox."""
    if not messages:
        return
    with fork_gate.entered():
        handed = {item.run_id for item in messages if sender.is_handed(at.app, item)}
        # A plain Celery task would not be told its end, it would run.
        idle = [item for item in messages if item.delivers and item.run_id in handed]
        faults = sender.publish(at.app, [item for item in messages if item not in idle])
        now = at.database.now()
        with at.database.transaction() as tx:
            sent = [item for item in messages if item not in idle and item.run_id not in faults]
            outbox.published(tx, sent, now)
            for item in sent:
                if item.run_id in handed:
                    runs.end_handed(tx, item.run_id, now)
            for item in idle:
                unsendable.give_up_telling(tx, item)
        for item in messages:
            if item.run_id in faults:
                _refuse(at, item, faults[item.run_id], told=item.run_id in handed)


def _refuse(at: Station, message: Message, error: Exception, *, told: bool) -> None:
    """Take a message that can never be sent out of the outbox; one with another fault is tried again later."""
    why = f"its message cannot be sent: {type(error).__name__}: {error}"[:500]
    logger.error("run %s of %s: %s", message.run_id, message.func_name, why)
    if not isinstance(error, sender.HOPELESS):
        return
    with at.database.transaction() as tx:
        if message.delivers:
            unsendable.give_up_telling(tx, message)
        else:
            failure = sender.backend_exception(at.app, ConfigurationError(why))
            unsendable.fail(tx, message, at.database.now(), why, failure, told=told)


def cancel_run(at: Station, run_id: str, reason: str = "cancelled") -> Run | None:
    """Cancel a run, then tell the workers.

    When this returns, a run that had not started never will; one that runs is told by its worker within a second.
    An id that nobody knows yet is remembered as cancelled.

    Returns:
        The run, or None where the id is not known yet.

    Raises:
        DatabaseUnavailableError: Nothing was cancelled.
    """
    now = at.database.now()
    with at.database.transaction() as tx:
        found = cancelling.cancel(tx, at.name, run_id, now, reason)
    announce_cancelled(at, [run_id])
    return found


def announce_cancelled(at: Station, ids: list[str]) -> None:
    """Have ends delivered and queued messages dropped; what counts is committed already."""
    try:
        sender.revoke(at.app, ids)
    except BrokerUnavailableError as error:
        logger.warning("workers will learn of the cancellation from the database: %s", error)


def find_run(at: Station, run_id: str) -> Run:
    """The run with this id.

    Raises:
        RunNotFoundError: There is none in the ledger.
    """
    with at.database.reading() as connection:
        found = runs.get(connection, run_id)
    if found is None:
        raise RunNotFoundError(
            f"no run has the id {run_id!r}: a run of .delay() is known from its first start on; "
            "`llmtasks runs` lists the latest"
        )
    return found


def _until(at: Station, now: datetime) -> datetime:
    return now + timedelta(seconds=at.settings.outbox_patience)
