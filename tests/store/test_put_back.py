"""The database's clock was put back by an hour: nothing that was under way waits for that hour to pass again."""

from datetime import timedelta
from typing import Any

import pytest

from llmtasks.states import RunState, ScheduleState
from llmtasks.store import put_back, schedules
from llmtasks.store.database import Database
from llmtasks.store.schedules import Schedule
from tests.store.rows_of import APP, NOW, ended, held, later, new_run, opened, owed, publish, row_of, schedule

#: What the clock shows after it was put back; it had shown NOW.
NOW_AGAIN = NOW - timedelta(hours=1)
PATIENCE = timedelta(seconds=3)


def forget(database: Database) -> None:
    with database.transaction() as tx:
        put_back.forget_the_lost_time(tx, APP, NOW, PATIENCE, NOW_AGAIN)


def renewed(database: Database, *rows: Schedule) -> list[Schedule]:
    """The schedules after their grids began anew where they had to."""
    with database.transaction() as tx:
        for row in rows:
            schedules.put(tx, row, NOW)
    for count in (None, 0):  # the second keeper finds nothing
        with database.transaction() as tx:
            after, begun = put_back.begin_grids_anew(tx, APP, "", NOW_AGAIN)
        assert after is None
        assert count is None or begun == count
    with database.reading() as connection:
        return [found for row in rows if (found := schedules.get(connection, row.id)) is not None]


def test_lease_runs_from_the_new_time(database: Database) -> None:
    """A run whose owner died just before is lost after one lease, not an hour later."""
    held(database, "a")

    forget(database)

    assert row_of(database, "a").heartbeat_at == NOW_AGAIN


def test_delay_before_the_next_attempt_keeps_its_length(database: Database) -> None:
    """Twenty seconds were between the attempts, and twenty seconds are; also when two keepers do it."""
    claim = held(database, "a")
    ended(database, claim, RunState.RETRYING, next_attempt_at=later(20))

    forget(database)
    forget(database)

    assert row_of(database, "a").next_attempt_at == NOW_AGAIN + timedelta(seconds=20)


def test_queued_run_is_missed_as_soon_as_before(database: Database) -> None:
    """The broker may have lost its message: that is looked for as if it had been published now."""
    opened(database, new_run("a"))
    publish(database, "a")

    forget(database)

    assert row_of(database, "a").published_at == NOW_AGAIN


@pytest.mark.parametrize(("seconds", "is_due"), [(0, True), (3, True), (600, False)])
def test_message_that_was_due_or_reserved_is_due(database: Database, seconds: float, is_due: bool) -> None:
    """One that was asked for at a later time of the clock keeps that time."""
    with database.transaction() as tx:
        from llmtasks.store import outbox, runs

        runs.open_run(tx, new_run("a"), NOW, later(seconds))
    forget(database)

    with database.transaction() as tx:
        assert outbox.is_due(tx, APP, NOW_AGAIN) is is_due
    assert owed(database) == {"a": "run"}


def test_message_that_was_asked_for_after_the_step_keeps_its_time(database: Database) -> None:
    """Keepers that start within the hour find the clock put back once more; what was made since is not touched."""
    with database.transaction() as tx:
        from llmtasks.store import outbox, runs

        runs.open_run(tx, new_run("a"), NOW_AGAIN, NOW_AGAIN + timedelta(minutes=10))
    forget(database)

    with database.transaction() as tx:
        assert not outbox.is_due(tx, APP, NOW_AGAIN)


def test_interval_begins_a_new_grid(database: Database) -> None:
    """Its next run comes within one interval, at an instant that it never had."""
    (found,) = renewed(database, schedule(next_run_at=later(60), last_run_at=NOW))

    assert found.next_run_at == NOW_AGAIN + timedelta(minutes=1)
    assert found.anchor == NOW_AGAIN


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "cron", "expression": "* * * * *", "timezone": "UTC", "every_us": None, "anchor": None},
        {"kind": "once", "every_us": None, "anchor": later(60)},
        {"next_run_at": later(86_400), "anchor": later(86_400), "last_run_at": None},
        {"next_run_at": later(60), "state": ScheduleState.PAUSED},
        {"every_us": 7_200_000_000, "next_run_at": later(60)},
    ],
    ids=["cron", "once", "asked for", "paused", "comes within its interval"],
)
def test_other_schedules_keep_their_time(database: Database, changes: dict[str, Any]) -> None:
    """Times of the clock come when it shows them; so does what somebody asked for."""
    before = schedule(**{"next_run_at": later(60), "last_run_at": NOW, **changes})

    (found,) = renewed(database, before)

    assert (found.next_run_at, found.anchor) == (before.next_run_at, before.anchor)


def test_clock_that_was_put_back_while_nobody_looked_shows_in_the_newest_run(database: Database) -> None:
    """A keeper that starts compares the clock with it."""
    with database.reading() as connection:
        assert put_back.newest(connection, APP) is None
    opened(database, new_run("a"), at=later(-5))
    opened(database, new_run("b"))

    with database.reading() as connection:
        assert put_back.newest(connection, APP) == NOW
