"""Waking: beat sleeps until something is due, or until somebody changes the schedules."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from llmtasks.states import ScheduleState
from llmtasks.store import schedules
from llmtasks.store.database import Database
from llmtasks.store.waking import POLL, Waking
from tests.conftest import on
from tests.servers import DatabaseServer
from tests.store.rows_of import NOW, later, schedule

#: Nobody sleeps so long who was woken.
LONG = 30.0
SOON = 5.0


@pytest.fixture
def waking(database: Database) -> Iterator[Waking]:
    waking = Waking(database)
    waking.sleep(LONG)  # the first call only begins to listen
    yield waking
    waking.close()


def slept(waking: Waking, seconds: float) -> float:
    """How long it slept; at most ``seconds`` and a bit."""
    began = time.monotonic()
    waking.sleep(seconds)
    return time.monotonic() - began


def put(database: Database, **changes: object) -> None:
    with database.transaction() as tx:
        schedules.put(tx, schedule("s", **changes), later(1))


def put_many(database: Database, **_changes: object) -> None:
    with database.transaction() as tx:
        schedules.put_many(tx, [schedule()], NOW)


@pytest.mark.parametrize("write", [put, put_many])
def test_change_by_another_wakes(database: Database, waking: Waking, write: Callable[..., None]) -> None:
    """A schedule that somebody writes ends the sleep at once, and the next sleep is as long as wished."""
    other = Database(str(database.url))
    writer = threading.Timer(0.2, write, args=(other,))
    writer.start()

    assert slept(waking, LONG) < SOON
    writer.join()
    assert slept(waking, 0.1) >= 0.1
    other.close()


def test_change_while_nobody_slept_wakes(database: Database, waking: Waking) -> None:
    """What was written during a tick is not slept through."""
    put(database)
    put(database, state=ScheduleState.PAUSED)

    assert slept(waking, LONG) < SOON


def test_nothing_wakes_where_nothing_changed(waking: Waking) -> None:
    """The sleep takes as long as was wished, as often as it is asked for."""
    assert all(0.1 <= slept(waking, 0.1) < SOON for _ in range(3))


def test_server_that_goes_away_only_shortens_the_sleep(database_server: DatabaseServer) -> None:
    """Its connection is gone: the sleep ends early, never with an error, and later changes wake again."""
    url = database_server.create_database()
    database = Database(url)
    database.migrate()
    waking = Waking(database)
    waking.sleep(LONG)

    database_server.cut(url)
    assert slept(waking, LONG) < SOON
    waking.sleep(POLL)
    put(database)
    assert slept(waking, LONG) < SOON

    waking.close()
    database.close()
    database_server.drop_database(url)


@on("postgresql")
def test_sleep_that_cannot_listen_closes_its_connection(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that refuses LISTEN costs no connection at each try, and the sleep still ends without an error."""
    monkeypatch.setattr("llmtasks.store.waking.CHANNEL", "no channel's name")
    waking = Waking(database)

    for _ in range(3):
        waking.sleep(0.01)

    assert waking._lone is None
