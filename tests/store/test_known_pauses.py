"""What a worker process knows of pauses: read when it changed, and asked for nothing else."""

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event

from llmtasks.known_pauses import KnownPauses
from llmtasks.states import PauseKind
from llmtasks.store import pauses
from llmtasks.store.database import Database
from llmtasks.store.pauses import Pause
from tests.conftest import on
from tests.store.rows_of import APP, NOW


@pytest.fixture
def at(database: Database) -> Any:
    """What a station has that matters here."""
    return SimpleNamespace(name=APP, database=database)


def pause(database: Database, name: str) -> None:
    with database.transaction() as tx:
        pauses.put(tx, APP, Pause(kind=PauseKind.FUNCTION, name=name, paused_at=NOW))


def test_nobody_knows_before_the_first_look(at: Any) -> None:
    """Until then each claim asks the database, lest a paused function starts while a worker does."""
    known = KnownPauses()
    assert known.may_hold_up(at, "f")

    known.refresh(at)

    assert not known.may_hold_up(at, "f")


def test_a_claim_asks_the_database_nothing(at: Any, database: Database) -> None:
    """What is known is in memory, of a paused function and of any other."""
    pause(database, "f")
    known = KnownPauses()
    known.refresh(at)
    seen: list[str] = []
    engine = database._open_engine()
    event.listen(engine, "before_cursor_execute", lambda *given: seen.append(given[2]))

    assert known.may_hold_up(at, "f")
    assert not known.may_hold_up(at, "g")

    assert seen == []


def _child(known: KnownPauses, url: str, asked: Any, answers: Any) -> None:
    database = Database(url)
    at: Any = SimpleNamespace(name=APP, database=database)
    for name in iter(asked.get, None):
        answers.put(known.may_hold_up(at, name))
    database.close()


@on("sqlite")
def test_forked_child_learns_of_each_change(at: Any, database: Database, database_url: str) -> None:
    """It reads the rows again when the main process saw them change, before its next claim."""
    known = KnownPauses()
    known.refresh(at)
    context = multiprocessing.get_context("fork")
    asked, answers = context.Queue(), context.Queue()
    database.close()
    child = context.Process(target=_child, args=(known, database_url, asked, answers))
    child.start()

    def child_says(name: str) -> bool:
        asked.put(name)
        return bool(answers.get(timeout=60))

    assert not child_says("f")
    pause(database, "f")
    assert not child_says("f")  # the main process has not looked
    known.refresh(at)
    assert child_says("f")
    with database.transaction() as tx:
        pauses.remove(tx, APP, PauseKind.FUNCTION, "f")
    known.refresh(at)
    assert not child_says("f")

    asked.put(None)
    child.join(30)
