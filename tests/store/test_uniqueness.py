"""Uniqueness in the ledger: what is in the way, what frees a key, and what many at once make of it."""

import multiprocessing
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from llmtasks.errors import DuplicateRunError
from llmtasks.states import ENDED, LIVE, RunState
from llmtasks.store import cancelling, keys, purging, rescue, rows, runs, uniqueness
from llmtasks.store.database import Database
from llmtasks.store.runs import NewRun
from llmtasks.store.uniqueness import Accepted
from llmtasks.uniqueness import Unique, rule_of
from tests.store.rows_of import (  # fmt: skip
    APP,
    LEASE,
    NOW,
    all_at_once,
    claimed,
    ended,
    held,
    later,
    new_run,
    owed,
    row_of,
    set_run,
    state_of,
)


def unique(key: str = "k", **options: Any) -> Unique:
    rule = rule_of({"unique": True, **options})
    assert rule is not None
    return Unique(key=key, rule=rule)


def asked(run_id: str, key: str = "k", *, schedule: str | None = None, **options: Any) -> NewRun:
    return new_run(run_id, unique=unique(key, **options), schedule_id=schedule)


def accepted(database: Database, new: NewRun, seconds: float = 0) -> Accepted:
    with database.transaction() as tx:
        return uniqueness.open_run(tx, new, later(seconds))


def named(database: Database) -> dict[str, str]:
    with database.reading() as connection:
        return {row.key: row.run_id for row in connection.execute(select(rows.unique))}


@pytest.mark.parametrize("state", sorted(LIVE))
def test_every_unfinished_run_is_in_the_way(database: Database, state: RunState) -> None:
    """Whoever asks meanwhile gets the run that is there; nothing is written for the second one."""
    assert accepted(database, asked("a")).is_new
    set_run(database, "a", state=state)

    found = accepted(database, asked("b"))

    assert (found.run.id, found.is_new, found.is_duplicate) == ("a", False, True)
    assert owed(database) == {"a": "run"}
    assert state_of(database, "a") == state


@pytest.mark.parametrize("state", sorted(ENDED))
def test_every_end_frees_the_key(database: Database, state: RunState) -> None:
    """However a run ended, and whether or not Celery was told: the next one is accepted."""
    accepted(database, asked("a"))
    set_run(database, "a", state=state)

    assert accepted(database, asked("b")).is_new
    assert named(database) == {"k": "b"}


def test_retry_keeps_the_key_and_the_end_after_it_frees_it(database: Database) -> None:
    """Attempts, their losses and a shutdown between them leave the run what it is."""
    accepted(database, asked("a"))
    claim = held(database, "a")
    ended(database, claim, RunState.RETRYING, next_attempt_at=NOW, counts=True)
    assert accepted(database, asked("b")).is_duplicate
    with database.transaction() as tx:
        rescue.start_retries(tx, APP, NOW)
    held(database, "a", attempts=1)
    with database.transaction() as tx:
        rescue.lose_silent(tx, APP, later(1), later(1), "{}")
    assert accepted(database, asked("b")).is_duplicate
    held(database, "a", attempts=2)
    with database.transaction() as tx:
        rescue.release(tx, "host/one", "a", NOW)
    assert accepted(database, asked("b")).is_duplicate

    ended(database, held(database, "a", attempts=2))

    assert accepted(database, asked("b")).is_new


def test_lost_for_good_and_cancelled_runs_free_the_key(database: Database) -> None:
    """Ends that no worker writes are ends too."""
    accepted(database, asked("a"))
    held(database, "a", max_retries=0)
    with database.transaction() as tx:
        rescue.lose_silent(tx, APP, later(1), later(1), "{}")
    assert accepted(database, asked("b")).is_new
    with database.transaction() as tx:
        cancelling.cancel(tx, APP, "b", NOW, "by hand")
    assert accepted(database, asked("c")).is_new
    with database.transaction() as tx:
        assert runs.end_unheld(tx, "c", NOW, RunState.SKIPPED, "expired before it started")

    assert accepted(database, asked("d")).is_new


def test_refuse_names_the_run_that_is_there(database: Database) -> None:
    """Its id and its state, as attributes and in the message; nothing is written."""
    accepted(database, asked("a", on_duplicate="refuse"))
    held(database, "a")

    with pytest.raises(
        DuplicateRunError, match=r"another run like a, which is running: .*`llmtasks cancel a`"
    ) as raised:
        accepted(database, asked("b", on_duplicate="refuse"))

    assert (raised.value.run_id, raised.value.state) == ("a", "running")
    assert row_of(database, "a").reason is None
    with database.reading() as connection:
        assert runs.get(connection, "b") is None


def test_replace_cancels_what_is_there_and_names_the_new_one(database: Database) -> None:
    """At once what nobody holds, with its message; by a request what runs: it goes on until its worker hears of it."""
    accepted(database, asked("a", on_duplicate="replace"))

    second = accepted(database, asked("b", on_duplicate="replace"))

    assert (second.run.id, second.is_new, second.cancelled) == ("b", True, ["a"])
    assert (row_of(database, "a").state, row_of(database, "a").reason) == (
        "cancelled",
        "replaced: run b takes its place",
    )
    assert owed(database) == {"b": "run"}
    held(database, "b")
    assert accepted(database, asked("c", on_duplicate="replace")).cancelled == ["b"]
    assert (row_of(database, "b").state, row_of(database, "b").reason) == ("running", "replaced: run c takes its place")
    assert row_of(database, "b").cancel_requested_at is not None


def test_period_counts_runs_that_did_their_work(database: Database) -> None:
    """From when they were accepted on, and succeeded and failed ones only: nothing was done by the others."""
    hour = timedelta(hours=1)
    accepted(database, asked("a", unique_for=hour))
    set_run(database, "a", state=RunState.SUCCEEDED)
    assert accepted(database, asked("b", unique_for=hour), 3599).run.id == "a"
    set_run(database, "a", state=RunState.FAILED)
    assert accepted(database, asked("b", unique_for=hour), 3599).run.id == "a"

    assert accepted(database, asked("b", unique_for=hour), 3600).is_new

    with database.transaction() as tx:
        cancelling.cancel(tx, APP, "b", NOW, "by hand")
    assert accepted(database, asked("c", unique_for=hour), 3601).is_new


def test_only_the_chosen_states_count(database: Database) -> None:
    """With those before the start, one may wait while another runs, and no third."""
    chosen: Any = {"unique_states": ("pending", "queued", "waiting")}
    accepted(database, asked("a", **chosen))
    assert accepted(database, asked("b", **chosen)).is_duplicate
    held(database, "a")

    assert accepted(database, asked("b", **chosen)).is_new
    assert accepted(database, asked("c", **chosen)).run.id == "b"


def test_run_that_is_known_by_its_id_is_left_as_it_is(database: Database) -> None:
    """Asking twice for one id, or for one that was cancelled before it came, decides nothing anew."""
    accepted(database, asked("a"))
    with database.transaction() as tx:
        cancelling.cancel(tx, APP, "unseen", NOW, "by hand")

    again, unseen = accepted(database, asked("a", "other")), accepted(database, asked("unseen"))

    assert (again.run.id, again.is_new, again.is_duplicate) == ("a", False, False)
    assert (unseen.run.state, unseen.is_new) == (RunState.CANCELLED, False)
    assert named(database) == {"k": "a"}


def test_keys_are_purged_with_their_runs(database: Database) -> None:
    """The table holds no more than the ledger does; a key that another run took since stays."""
    for number, key in enumerate(("k", "gone", "taken")):
        accepted(database, asked(f"run{number}", key))
        set_run(database, f"run{number}", state=RunState.SUCCEEDED, ended_at=NOW, delivered=True)
    accepted(database, asked("new", "taken"))
    accepted(database, asked("live", "k"))

    with database.transaction() as tx:
        assert purging.purge_slice(tx, APP, later(1)) == 3

    assert named(database) == {"k": "live", "taken": "new"}


def test_locked_key_that_nobody_gets_leaves_no_row(database: Database) -> None:
    """Beat asks for keys before it knows whether an instant runs."""
    with database.transaction() as tx:
        assert keys.lock(tx, {"b", "a"}) == {}
        keys.give(tx, {"a": "run"})
        keys.drop_unnamed(tx, {"a", "b"})

    assert named(database) == {"a": "run"}


def test_functions_that_are_not_unique_write_no_key(database: Database) -> None:
    """What nobody asked for costs nothing."""
    assert accepted(database, new_run("a")).is_new
    assert accepted(database, new_run("b")).is_new

    assert named(database) == {}


def test_one_of_many_threads_is_accepted(database: Database) -> None:
    """Twelve ask at once for the same, four times over; each time one run is opened and all name it."""
    for turn in range(4):
        found = all_at_once(lambda new: accepted(database, new), [asked(f"{turn}-{n}", f"k{turn}") for n in range(12)])

        assert sum(item.is_new for item in found) == 1
        assert {item.run.id for item in found} == {named(database)[f"k{turn}"]}


def test_one_of_many_that_replace_is_left(database: Database) -> None:
    """Each cancels the one before it; the last one stands, and no two."""
    found = all_at_once(
        lambda new: accepted(database, new), [asked(f"run{n}", on_duplicate="replace") for n in range(8)]
    )

    assert all(item.is_new for item in found)
    left = [number for number in range(8) if state_of(database, f"run{number}") not in ENDED]
    assert [f"run{left[0]}"] == [named(database)["k"]] == [*owed(database)]
    assert len(left) == 1


def _ask(url: str, number: int, gate: Any, answers: Any) -> None:
    database = Database(url)
    gate.wait(120)
    for turn in range(20):
        found = accepted(database, asked(f"{turn}-{number}", f"k{turn}"))
        answers.put((turn, found.run.id, found.is_new))
    database.close()


def test_one_of_many_processes_is_accepted(database: Database, database_url: str) -> None:
    """Four processes ask twenty times at once, and no key has two runs."""
    context = multiprocessing.get_context("spawn")
    gate, answers = context.Barrier(4), context.Queue()
    children = [context.Process(target=_ask, args=(database_url, n, gate, answers)) for n in range(4)]
    for child in children:
        child.start()
    said = [answers.get(timeout=120) for _ in range(80)]
    for child in children:
        child.join(30)

    for turn in range(20):
        mine = [(run_id, is_new) for of, run_id, is_new in said if of == turn]
        assert len({run_id for run_id, _ in mine}) == 1
        assert sum(is_new for _, is_new in mine) == 1


def test_ask_and_purge_at_once(database: Database) -> None:
    """A purge that removes a key while somebody asks for it leaves a run that has it."""
    for turn in range(10):
        accepted(database, asked(f"old{turn}"))
        set_run(database, f"old{turn}", state=RunState.SUCCEEDED, ended_at=NOW, delivered=True)

        def do(number: int, turn: int = turn) -> Accepted | int:
            if number:
                return accepted(database, asked(f"new{turn}-{number}"))
            with database.transaction() as tx:
                return purging.purge_slice(tx, APP, later(1))

        found = [item for item in all_at_once(do, range(4)) if isinstance(item, Accepted)]

        assert sum(item.is_new for item in found) == 1
        assert named(database) == {"k": found[0].run.id}
        set_run(database, found[0].run.id, state=RunState.SUCCEEDED, ended_at=NOW, delivered=True)
        assert claimed(database, found[0].run.id, at=NOW + LEASE) is None
