"""Totals: sums of past hours say what counting the runs would say."""

import random
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import insert, select

from llmtasks.states import ENDED, RunState
from llmtasks.store import purging, rows, statistics, totals
from llmtasks.store.database import Database
from llmtasks.store.statistics import Count
from tests.store.rows_of import APP, all_at_once

DAY = datetime(2026, 3, 1, tzinfo=UTC)
FUNCTIONS = ("mail", "index")
STATES = sorted(ENDED)


def fill(database: Database, *instants: datetime, app: str = APP, seed: int = 1) -> None:
    """Store runs that ended at these instants, of either function and in any state."""
    chance = random.Random(seed)
    found = [
        {
            "id": f"{app} {seed} {number}", "app": app, "func_name": chance.choice(FUNCTIONS), "name": "x",
            "state": chance.choice(STATES), "priority": 5, "attempts": chance.randint(0, 4),
            "losses": chance.randint(0, 1),
            "run_seconds": chance.choice([None, 0.5, 2.25]), "created_at": at, "ended_at": at, "delivered": True,
        }
        for number, at in enumerate(instants)
    ]  # fmt: skip
    with database.transaction() as tx:
        tx.execute(insert(rows.runs), found)


def sum_all(database: Database, now: datetime) -> int:
    """Sum hour after hour as keepers do; returns how many."""
    hours = 0
    while totals.sum_next_hour(database, APP, now):
        hours += 1
    return hours


def counted(database: Database, since: datetime, func_name: str | None = None) -> list[Count]:
    with database.reading() as connection:
        return in_order(statistics.ended(connection, APP, since, func_name=func_name))


def summed(database: Database, since: datetime, func_name: str | None = None) -> list[Count]:
    with database.reading() as connection:
        return in_order(totals.ended(connection, APP, since, func_name))


def in_order(counts: list[Count]) -> list[Count]:
    return sorted(counts, key=lambda item: (item.func_name, item.state))


@pytest.mark.parametrize("seed", range(3))
def test_totals_say_what_counting_says(database: Database, seed: int) -> None:
    """Whatever the window's begin: in a summed hour, on its edge, after all of them, before the first."""
    chance = random.Random(seed)
    ends = [DAY + timedelta(hours=hour) for hour in range(4)]
    ends += [DAY + timedelta(seconds=chance.randint(0, 30 * 3600)) for _ in range(150)]
    fill(database, *ends, seed=seed)

    hours = sum_all(database, DAY + timedelta(hours=24, minutes=10))

    assert 15 <= hours <= 24
    begins = [*ends[:6], DAY - timedelta(days=1), *(DAY + timedelta(minutes=chance.randint(0, 1900)) for _ in range(6))]
    for since in begins:
        for func_name in (None, "mail"):
            assert summed(database, since, func_name) == counted(database, since, func_name)


def test_hour_is_summed_when_it_is_over_and_a_while_has_passed(database: Database) -> None:
    """What ended shortly before the hour's end may be committed after it."""
    fill(database, DAY + timedelta(minutes=59))

    assert not totals.sum_next_hour(database, APP, DAY + timedelta(hours=1, minutes=9))
    assert totals.sum_next_hour(database, APP, DAY + timedelta(hours=1, minutes=10))
    assert not totals.sum_next_hour(database, APP, DAY + timedelta(days=9))


def test_hours_without_ends_are_passed_over(database: Database) -> None:
    """A quiet month costs no step for each of its hours."""
    fill(database, DAY, DAY + timedelta(days=30))

    assert sum_all(database, DAY + timedelta(days=31)) == 2


def test_one_of_many_keepers_sums_an_hour(database: Database) -> None:
    """Keepers that look at the same moment do not count an hour twice."""
    fill(database, DAY, DAY)
    now = DAY + timedelta(hours=3)

    done = all_at_once(lambda _: totals.sum_next_hour(database, APP, now), range(6))

    assert sum(done) == 1
    assert summed(database, DAY) == counted(database, DAY)


def test_purged_runs_still_count_until_their_hours_are_forgotten(database: Database) -> None:
    """A statistic of past hours does not shrink because rows were deleted early; a purge by age forgets the hours."""
    fill(database, DAY, DAY + timedelta(minutes=1), DAY + timedelta(hours=5))
    sum_all(database, DAY + timedelta(days=1))
    before = summed(database, DAY)

    with database.transaction() as tx:
        assert purging.purge_slice(tx, APP, DAY + timedelta(hours=1)) == 2
    assert summed(database, DAY) == before

    assert sum(purging.purge(database, APP, DAY + timedelta(hours=1, minutes=30))) == 0
    assert summed(database, DAY) == counted(database, DAY)


def test_apps_are_summed_apart(database: Database) -> None:
    """Each app has its own hours and its own progress."""
    fill(database, DAY, app="another")
    fill(database, DAY + timedelta(hours=1))

    assert sum_all(database, DAY + timedelta(days=1)) == 1
    with database.reading() as connection:
        assert {row.app for row in connection.execute(select(rows.totals))} == {APP}
    assert {item.state for item in summed(database, DAY)} <= {RunState(state) for state in STATES}
