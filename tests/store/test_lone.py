"""Statements that are a transaction of their own: they say what the transaction would say, or leave it to one."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from llmtasks.errors import DatabaseUnavailableError
from llmtasks.states import RunState
from llmtasks.store import claims, ends
from llmtasks.store.claims import Claim
from llmtasks.store.database import Database
from llmtasks.store.ends import End
from llmtasks.store.pinging import IDLE
from tests.servers import DatabaseServer
from tests.store.rows_of import (
    LEASE,
    NOW,
    all_at_once,
    claimed_in_transaction,
    ended,
    everything,
    held,
    later,
    new_run,
    offer,
    opened,
    set_run,
    started,
    state_of,
    taken_slots,
)


def claimed_alone(database: Database, run_id: str, at: datetime = NOW, **changes: Any) -> Claim | None:
    with database.lone() as lone:
        return claims.claim_slotless(lone, offer(run_id, **changes), at, at - LEASE)


@pytest.mark.parametrize("known", [False, True])
def test_one_statement_writes_what_the_transaction_writes(database: Database, known: bool) -> None:
    """A run claimed and ended by lone statements has the same row as one claimed and ended in transactions."""
    if known:
        opened(database, new_run("alone", max_retries=1), new_run("within", max_retries=1))
    how = End(state=RunState.RETRYING, error="boom", next_attempt_at=later(5), run_seconds=1.5)

    alone = claimed_alone(database, "alone", later(1))
    within = claimed_in_transaction(database, "within", later(1))
    assert alone is not None
    assert within is not None
    with database.lone() as lone:
        assert ends.end_lone(lone, alone, how, later(2))
    with database.transaction() as tx:
        assert ends.end(tx, within, how, later(2)) == (True, [])

    assert everything(database, "alone") == everything(database, "within")


@pytest.mark.parametrize("state", [state for state in RunState if state not in {RunState.PENDING, RunState.QUEUED}])
def test_one_statement_refuses_what_the_transaction_refuses(database: Database, state: RunState) -> None:
    """What has ended and was told, runs elsewhere or waits is not taken, and its row stays as it is."""
    opened(database, new_run("a"))
    set_run(database, "a", state=state, delivered=True, owner="host/two", heartbeat_at=NOW)
    before = everything(database, "a")

    assert claimed_alone(database, "a") is None
    assert claimed_in_transaction(database, "a") is None
    assert everything(database, "a") == before


def test_what_needs_a_slot_is_left_to_a_transaction(database: Database) -> None:
    """Runs with a limit of their function or of their schedule are not touched by the statement."""
    opened(database, new_run("a"), new_run("b", schedule_id="s", scheduled_for=NOW, schedule_slots=1))

    assert claimed_alone(database, "a", function_slots=2) is None
    assert claimed_alone(database, "b") is None
    assert [state_of(database, run_id) for run_id in ("a", "b")] == [RunState.PENDING, RunState.PENDING]


def test_slots_of_other_runs_are_no_matter(database: Database) -> None:
    """A run without a limit is taken by one statement, also while some other run holds a slot."""
    started(database, "limited", function_slots=1)
    opened(database, new_run("free"))

    assert claimed_alone(database, "free") is not None


def test_run_that_holds_a_slot_is_left_to_a_transaction(database: Database) -> None:
    """A slot handed to a run by code that still had a limit is given back by the transaction of its claim."""
    first, _ = started(database, "first", function_slots=1)
    started(database, "second", function_slots=1)
    assert ended(database, first) == (True, ["second"])

    assert claimed_alone(database, "second") is None
    claim, full = started(database, "second")

    assert full is None
    assert claim.is_slotless
    assert taken_slots(database) == {}


def test_end_that_hands_a_slot_over_is_no_lone_statement(database: Database) -> None:
    """Only the end of a run without limits, and without another task in its place, is nothing but its row."""
    free = held(database, "free")
    limited, _ = started(database, "limited", function_slots=1)

    assert ends.is_lone(free, End(state=RunState.SUCCEEDED))
    assert not ends.is_lone(free, End(state=RunState.PENDING, replacement="{}"))
    assert not ends.is_lone(limited, End(state=RunState.SUCCEEDED))


def test_late_owner_ends_nothing_by_one_statement(database: Database) -> None:
    """The number of a claim fences lone statements too."""
    late = held(database, "a")
    set_run(database, "a", state=RunState.QUEUED, owner=None)
    held(database, "a", later(1))

    assert ended(database, late) == (False, [])
    assert state_of(database, "a") is RunState.RUNNING


def test_one_of_many_claims_at_once_succeeds(database: Database) -> None:
    """Copies of a message that arrive at the same moment start one attempt."""
    opened(database, new_run("a"))

    found = all_at_once(lambda owner: claimed_alone(database, "a", owner=f"host/{owner}"), range(8))

    assert [claim.claim_no for claim in found if claim is not None] == [1]


def test_locked_file_is_unavailable_to_one_statement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone statement that waits too long for a writer is refused in our own error, and works afterwards."""
    monkeypatch.setattr("llmtasks.store.engines.SQLITE_BUSY_TIMEOUT", 0.1)
    first, second = (Database(f"sqlite:///{tmp_path / 'x.db'}") for _ in range(2))

    with first.transaction(), pytest.raises(DatabaseUnavailableError, match="database is locked"):
        claimed_alone(second, "a")

    assert claimed_alone(second, "a") is not None
    first.close()
    second.close()


def test_one_statement_survives_a_restart_of_its_server(database_server: DatabaseServer) -> None:
    """Connections that the server ended are an outage where they are in use, and are replaced where they lay idle."""
    url = database_server.create_database()
    database = Database(url)
    database.migrate()
    assert claimed_alone(database, "a") is not None

    database_server.cut(url)
    with pytest.raises(DatabaseUnavailableError):
        claimed_alone(database, "b")
    assert claimed_alone(database, "b") is not None

    database_server.cut(url)
    database._lones._idle[:] = [(lone, since - IDLE) for lone, since in database._lones._idle]
    assert claimed_alone(database, "c") is not None
    database.close()
    database_server.drop_database(url)
