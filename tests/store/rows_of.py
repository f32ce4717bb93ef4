"""Short ways to make and to look at rows, for the tests of the store."""

import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import select, update

from llmtasks.states import RunState
from llmtasks.store import claims, ends, outbox, rows, runs
from llmtasks.store.claims import Claim, Offer
from llmtasks.store.database import Database
from llmtasks.store.ends import End
from llmtasks.store.runs import NewRun
from llmtasks.store.schedules import Schedule

T = TypeVar("T")

APP = "shop"
NOW = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
LEASE = timedelta(seconds=12)


def later(seconds: float) -> datetime:
    """An instant after NOW."""
    return NOW + timedelta(seconds=seconds)


def new_run(run_id: str = "", **changes: Any) -> NewRun:
    """What opens a run."""
    values: dict[str, Any] = {
        "id": run_id or str(uuid.uuid4()),
        "app": APP,
        "func_name": "sync_emails",
        "name": "sync_emails",
        "args": "[]",
        "kwargs": '{"folder": "INBOX"}',
        "envelope": "{}",
        "queue": None,
        "priority": 5,
    }
    return NewRun(**{**values, **changes})


def offer(run_id: str, **changes: Any) -> Offer:
    """A message that a worker got."""
    values: dict[str, Any] = {
        "id": run_id,
        "app": APP,
        "func_name": "sync_emails",
        "args": "[1]",
        "kwargs": "{}",
        "envelope": '{"link": null}',
        "queue": "celery",
        "priority": 5,
        "attempts": 0,
        "max_retries": 3,
        "retry_delay": 1.0,
        "function_slots": None,
        "owner": "host/one",
        "worker": "celery@host",
    }
    return Offer(**{**values, **changes})


def opened(database: Database, *new: NewRun, at: datetime = NOW) -> None:
    """Open runs."""
    with database.transaction() as tx:
        for item in new:
            assert runs.open_run(tx, item, at)


def claimed(database: Database, run_id: str, at: datetime = NOW, **changes: Any) -> Claim | None:
    """Claim a run as a worker does: in one statement, or in a transaction where that is not enough."""
    with database.lone() as lone:
        claim = claims.claim_slotless(lone, offer(run_id, **changes), at, at - LEASE)
    return claim or claimed_in_transaction(database, run_id, at, **changes)


def claimed_in_transaction(database: Database, run_id: str, at: datetime = NOW, **changes: Any) -> Claim | None:
    """Claim a run in a transaction of its own."""
    with database.transaction() as tx:
        return claims.claim(tx, offer(run_id, **changes), at, at - LEASE)


def held(database: Database, run_id: str, at: datetime = NOW, **changes: Any) -> Claim:
    """Claim a run that must be free to claim."""
    claim = claimed(database, run_id, at, **changes)
    assert claim is not None
    return claim


def started(database: Database, run_id: str, at: datetime = NOW, **changes: Any) -> tuple[Claim, str | None]:
    """Claim a run with its slots, as a worker does: without a free one it waits.

    Returns:
        The claim, and the reason why it does not start.
    """
    given = offer(run_id, **changes)
    with database.transaction() as tx:
        claim = claims.claim(tx, given, at, at - LEASE)
        assert claim is not None
        full = claims.take_slots(tx, APP, given.func_name, claim, at)
        if full is not None:
            claims.put_aside(tx, claim, RunState.WAITING, full, at)
        return claim, full


def ended(
    database: Database, claim: Claim, state: RunState = RunState.SUCCEEDED, at: datetime = NOW, **how: Any
) -> tuple[bool, list[str]]:
    """End the attempt of a claim as a worker does: in one statement, or in a transaction where that is not enough."""
    end = End(state=state, **how)
    if ends.is_lone(claim, end):
        with database.lone() as lone:
            return ends.end_lone(lone, claim, end, at), []
    with database.transaction() as tx:
        return ends.end(tx, claim, end, at)


def row_of(database: Database, run_id: str) -> Any:
    """All columns of a run."""
    with database.reading() as connection:
        return connection.execute(select(rows.runs).where(rows.runs.c.id == run_id)).one()


def state_of(database: Database, run_id: str) -> RunState:
    """The state of a run."""
    return RunState(row_of(database, run_id).state)


def set_run(database: Database, run_id: str, **values: Any) -> None:
    """Write columns of a run by hand."""
    with database.transaction() as tx:
        tx.execute(update(rows.runs).where(rows.runs.c.id == run_id).values(**values))


def owed(database: Database) -> dict[str, str]:
    """What is in the outbox: the kind of message by the run's id."""
    with database.reading() as connection:
        return {row.run_id: row.kind for row in connection.execute(select(rows.outbox))}


def everything(database: Database, run_id: str) -> dict[str, Any]:
    """A run's whole row but its id, to be compared with another run's."""
    row: dict[str, Any] = row_of(database, run_id)._asdict()
    row.pop("id")
    return row


def taken_slots(database: Database) -> dict[tuple[str, int], str]:
    """Who has which place."""
    with database.reading() as connection:
        return {(row.scope, row.place): row.run_id for row in connection.execute(select(rows.slots))}


def publish(database: Database, *ids: str, at: datetime = NOW) -> None:
    """Take messages out of the outbox as a relay that sent them."""
    with database.transaction() as tx:
        messages = outbox.take_these(tx, list(ids), at + timedelta(seconds=3))
        outbox.published(tx, messages, at)


def schedule(schedule_id: str = "", **changes: Any) -> Schedule:
    """A schedule of every minute."""
    values: dict[str, Any] = {
        "id": schedule_id or str(uuid.uuid4()),
        "app": APP,
        "name": "emails",
        "func_name": "sync_emails",
        "kind": "interval",
        "every_us": 60_000_000,
        "anchor": NOW,
        "next_run_at": NOW,
    }
    return Schedule(**{**values, **changes})


def all_at_once(work: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """Call ``work`` for every item, each in a thread of its own, all released at the same moment."""
    items = list(items)
    gate = threading.Barrier(len(items))

    def enter(item: Any) -> T:
        gate.wait(30)
        return work(item)

    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(enter, items))
