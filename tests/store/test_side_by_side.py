"""Beats, workers and keepers at one server: what one holds, the others neither wait for nor trip over."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy import text

from llmtasks.errors import DatabaseUnavailableError
from llmtasks.states import ENDED, RunState, ScheduleState
from llmtasks.store import claims, ends, held, outbox, rescue, runs, schedules
from llmtasks.store.database import Database
from llmtasks.store.ends import End
from llmtasks.store.schedules import Advance
from tests.conftest import SERVERS, on
from tests.store.rows_of import APP, LEASE, NOW, all_at_once, later, new_run, offer, opened, row_of, schedule, state_of

SECONDS = 2.0
#: Instants of the schedules are long past then.
MUCH_LATER = later(1e6)

pytestmark = on(*SERVERS)


def tick(database: Database, limit: int, meanwhile: Callable[[], None] = lambda: None) -> int:
    """What beat does with due schedules; ``meanwhile`` before the end of the transaction."""
    with database.transaction() as tx:
        due = [schedules.from_row(row) for row in schedules.due(tx, APP, MUCH_LATER, limit)]
        new = [new_run(schedule_id=item.id, scheduled_for=item.next_run_at) for item in due]
        runs.open_many(tx, new, NOW, later(3))
        moved = [
            Advance(
                schedule_id=item.id, next_at=item.next_run_at + timedelta(seconds=1), last_at=item.next_run_at,
                to=ScheduleState.ACTIVE, why=None,
            )
            for item in due
            if item.next_run_at
        ]  # fmt: skip
        schedules.advance(tx, moved)
        meanwhile()
    return len(due)


def claim_and_end(database: Database, run_id: str) -> None:
    """What a worker does with a run that has one place."""
    with database.transaction() as tx:
        given = offer(run_id, function_slots=1)
        claim = claims.claim(tx, given, NOW, NOW - LEASE)
        if claim is None or claim.state in ENDED:
            return
        full = claims.take_slots(tx, APP, given.func_name, claim, NOW)
        if full is not None:
            claims.put_aside(tx, claim, RunState.WAITING, full, NOW)
            return
    with database.transaction() as tx:
        held.stamp(tx, given.owner, [run_id], NOW)
    with database.transaction() as tx:
        ends.end(tx, claim, End(state=RunState.SUCCEEDED, delivered=True), NOW)


def keep(database: Database) -> None:
    """What a keeper does."""
    with database.transaction() as tx:
        rescue.promote(tx, APP, NOW)
    with database.transaction() as tx:
        messages = outbox.take_due(tx, APP, NOW, later(0), 50)
    with database.transaction() as tx:
        outbox.published(tx, messages, NOW)


def many_schedules(database: Database, count: int) -> None:
    with database.transaction() as tx:
        schedules.put_many(tx, [schedule(f"s{number:04}", next_run_at=later(number)) for number in range(count)], NOW)


def test_open_tick_keeps_nobody_waiting(database: Database) -> None:
    """While one beat is in the middle of its transaction, another ticks, a worker claims and people open runs."""
    many_schedules(database, 8)

    def others() -> None:
        assert tick(database, 4) == 4
        opened(database, new_run("by hand"))
        claim_and_end(database, "sent")
        claim_and_end(database, "by hand")
        keep(database)

    assert tick(database, 4, others) == 4
    assert [state_of(database, item) for item in ("sent", "by hand")] == [RunState.SUCCEEDED] * 2


def test_beats_side_by_side_never_deadlock(database: Database) -> None:
    """For some seconds two beats dispatch as fast as they can: no error, and each instant has one run."""
    many_schedules(database, 300)
    until = time.monotonic() + SECONDS

    def beat(_: int) -> int:
        fired = 0
        while time.monotonic() < until:
            fired += tick(database, 40)
        return fired

    fired = all_at_once(beat, range(2))

    with database.reading() as connection:
        recorded = connection.execute(text("SELECT count(*) FROM llmtasks_runs")).scalar_one()
    assert min(fired) > 0
    assert recorded == sum(fired)


def test_everybody_at_once_ends_every_run(database: Database) -> None:
    """Beats, workers and keepers at the same rows: a deadlock, where there is one, is an outage of one transaction."""
    many_schedules(database, 50)
    ids = [f"run{number}" for number in range(25)]
    failed: list[str] = []
    over = threading.Event()

    def persistently(work: Callable[[], object]) -> None:
        while True:
            try:
                work()
            except DatabaseUnavailableError as error:
                failed.append(str(error))
            else:
                return

    def play(part: int) -> None:
        if part < 3:
            for run_id in ids[part:] + ids[:part]:
                persistently(lambda run_id=run_id: claim_and_end(database, run_id))  # type: ignore[misc]
            over.set()
        while not over.is_set():
            persistently(lambda: tick(database, 5) if part == 3 else keep(database))

    all_at_once(play, range(5))
    for _ in ids:
        persistently(lambda: keep(database))
        for run_id in ids:
            if state_of(database, run_id) is not RunState.SUCCEEDED:
                claim_and_end(database, run_id)

    assert {row_of(database, run_id).state for run_id in ids} == {"succeeded"}
    assert len(failed) < 10, failed
