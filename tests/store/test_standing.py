"""What stands between a run and its start: its outbox row, who has the slots, who is before it in line."""

from llmtasks.states import RunState
from llmtasks.store import runs, standing
from llmtasks.store.database import Database
from llmtasks.store.standing import Holder
from tests.store.rows_of import APP, NOW, later, new_run, opened, publish, set_run, started


def run_of(database: Database, run_id: str) -> runs.Run:
    with database.reading() as connection:
        found = runs.get(connection, run_id)
    assert found is not None
    return found


def test_standing_has_the_outbox_beside_the_run(database: Database) -> None:
    """When its message may be sent, and how often one was."""
    opened(database, new_run("a"))
    with database.reading() as connection:
        owed = standing.standing(connection, "a")
    publish(database, "a", at=later(2))
    with database.reading() as connection:
        sent = standing.standing(connection, "a")

    assert (owed.app, owed.available_at, owed.publications, owed.published_at) == (APP, NOW, 0, None)
    assert (sent.available_at, sent.publications, sent.published_at) == (None, 1, later(2))


def test_holders_of_a_scope_are_in_order_of_their_places(database: Database) -> None:
    """With who runs them and since when; a slot whose run is gone has no name."""
    for number, name in enumerate("abc"):
        started(database, name, at=later(number), function_slots=3, worker=f"w{number}")
    with database.transaction() as tx:
        tx.execute(runs.runs.delete().where(runs.runs.c.id == "b"))
        found = standing.holders(tx, f"function:{APP}:sync_emails")
        assert standing.holders(tx, "schedule:none") == []

    known = {"name": "sync_emails", "state": RunState.RUNNING}
    assert found == [
        Holder(run_id="a", worker="w0", taken_at=later(0), **known),  # type: ignore[arg-type]
        Holder(run_id="b", worker=None, taken_at=later(1), name=None, state=None),
        Holder(run_id="c", worker="w2", taken_at=later(2), **known),  # type: ignore[arg-type]
    ]


def test_line_for_a_slot_goes_by_priority_then_age_then_id(database: Database) -> None:
    """Counted are those that get a slot before this run, of the same function or the same schedule."""
    for name, age, priority in (("first", 5, 1), ("old", 1, 5), ("same", 2, 5), ("tame", 2, 5), ("late", 3, 5)):
        started(database, f"x{name}", at=NOW, function_slots=1)  # the first one has the slot, the others wait
        set_run(database, f"x{name}", created_at=later(age), priority=priority)
    started(database, "other", at=NOW, func_name="other", function_slots=1)
    set_run(database, "xlate", schedule_id="s", schedule_slots=1)
    set_run(database, "xold", schedule_id="s", schedule_slots=1)
    scope = f"function:{APP}:sync_emails"

    with database.reading() as connection:
        ahead = {
            name: standing.before_in_line(connection, APP, run_of(database, name), scope)
            for name in ("xold", "xsame", "xtame", "xlate")
        }
        of_schedule = standing.before_in_line(connection, APP, run_of(database, "xlate"), "schedule:s")

    assert ahead == {"xold": 0, "xsame": 1, "xtame": 2, "xlate": 3}
    assert of_schedule == 1


def test_last_instant_is_the_latest_that_was_scheduled(database: Database) -> None:
    """A run by hand is none."""
    opened(
        database,
        new_run("a", schedule_id="s", scheduled_for=later(60)),
        new_run("b", schedule_id="s", scheduled_for=later(120), reason="late"),
        new_run("c", schedule_id="s"),
        new_run("d", schedule_id="t", scheduled_for=later(300)),
    )

    with database.reading() as connection:
        last = standing.last_instant(connection, "s")
        assert standing.last_instant(connection, "none") is None

    assert last is not None
    assert (last.id, last.scheduled_for, last.reason) == ("b", later(120), "late")
