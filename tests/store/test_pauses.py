"""Pauses: recorded once, and while there is one nothing of the function is promoted."""

from llmtasks.states import PauseKind, RunState
from llmtasks.store import claims, pauses, rescue, runs, slots
from llmtasks.store.database import Database
from llmtasks.store.pauses import Pause
from tests.store.rows_of import APP, NOW, ended, held, later, new_run, opened, owed, started

OPS = Pause(kind=PauseKind.FUNCTION, name="sync_emails", paused_at=NOW, paused_by="ops", reason="the provider is down")


def put(database: Database, pause: Pause = OPS, app: str = APP) -> Pause:
    with database.transaction() as tx:
        return pauses.put(tx, app, pause)


def resume(database: Database) -> Pause | None:
    with database.transaction() as tx:
        return pauses.remove(tx, APP, PauseKind.FUNCTION, "sync_emails")


def put_aside(database: Database, *ids: str) -> None:
    """Leave runs waiting as a claim of a paused function does."""
    for run_id in ids:
        claim = held(database, run_id)
        with database.transaction() as tx:
            claims.put_aside(tx, claim, RunState.WAITING, str(OPS), NOW)


def promoted(database: Database, limit: int = 200) -> list[str]:
    with database.transaction() as tx:
        return [*pauses.release(tx, APP, NOW, limit), *rescue.promote(tx, APP, NOW)]


def test_pause_is_recorded_once_and_ended_once(database: Database) -> None:
    """Of a paused function it stays who wanted that; each app and each kind is by itself."""
    assert put(database) == OPS
    assert put(database, Pause(kind=PauseKind.FUNCTION, name="sync_emails", paused_at=later(9))) == OPS
    queue = Pause(kind=PauseKind.QUEUE, name="sync_emails", paused_at=NOW)
    put(database, queue)
    put(database, app="another")

    with database.reading() as connection:
        assert pauses.find(connection, APP) == [OPS, queue]
        assert pauses.get(connection, APP, PauseKind.FUNCTION, "others") is None
    assert resume(database) == OPS
    assert resume(database) is None
    with database.reading() as connection:
        assert pauses.find(connection, APP) == [queue]
        assert pauses.find(connection, "another") == [OPS]


def test_pause_says_who_when_and_why() -> None:
    """In one line, for the reason of a run."""
    assert str(OPS) == ("function 'sync_emails' is paused by ops since 2026-03-01 12:00:00 UTC: the provider is down")
    assert str(Pause(kind=PauseKind.QUEUE, name="q", paused_at=NOW)) == (
        "queue 'q' is paused since 2026-03-01 12:00:00 UTC"
    )


def test_runs_of_a_paused_function_wait_and_go_on_by_priority_and_age(database: Database) -> None:
    """None goes on before it is resumed; then as many as are asked for, the first in line first."""
    opened(database, new_run("late", priority=1), at=later(2))
    opened(database, new_run("old"), new_run("urgent", priority=1), at=later(1))
    opened(database, new_run("older"), at=NOW)
    put_aside(database, "late", "old", "urgent", "older")
    put(database)
    assert promoted(database) == []

    resume(database)
    with database.transaction() as tx:
        assert pauses.release(tx, APP, NOW, 3) == ["urgent", "late", "older"]

    assert promoted(database) == ["old"]
    assert promoted(database) == []
    assert {"late", "old", "older", "urgent"} <= {*owed(database)}
    with database.reading() as connection:
        found = runs.get(connection, "old")
    assert found is not None
    assert (found.state, found.reason, found.attempts) == (RunState.PENDING, None, 0)


def test_free_slot_is_not_handed_to_a_run_whose_function_is_paused(database: Database) -> None:
    """It goes to the next in line of another function of the schedule, and to the paused one when it is resumed."""
    opened(database, new_run("holds"), new_run("waits"))
    first, _ = started(database, "holds", function_slots=1)
    assert started(database, "waits", function_slots=1)[1] is not None
    put(database)

    assert ended(database, first)[1] == []
    assert promoted(database) == []
    with database.transaction() as tx:
        assert slots.hand_over(tx, f"function:{APP}:sync_emails", NOW) == []
        assert slots.waiting_scopes(tx, APP) == []

    resume(database)
    assert promoted(database) == ["waits"]


def test_run_that_waits_for_a_slot_is_not_released_without_one(database: Database) -> None:
    """Only those that wait for nothing but their function are."""
    opened(database, new_run("holds"), new_run("waits"))
    started(database, "holds", function_slots=1)
    started(database, "waits", function_slots=1)

    with database.transaction() as tx:
        assert pauses.release(tx, APP, NOW, 10) == []
