"""The ledger: opening, reading, cancelling and purging runs."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from llmtasks.states import UNSTARTED, RunState
from llmtasks.store import cancelling, outbox, purging, runs
from llmtasks.store.database import Database
from tests.store.rows_of import (
    APP,
    NOW,
    all_at_once,
    ended,
    held,
    later,
    new_run,
    opened,
    owed,
    row_of,
    set_run,
    state_of,
)


def cancel(database: Database, run_id: str, reason: str = "cancelled") -> runs.Run | None:
    with database.transaction() as tx:
        return cancelling.cancel(tx, APP, run_id, later(1), reason)


def get(database: Database, run_id: str) -> runs.Run | None:
    with database.reading() as connection:
        return runs.get(connection, run_id)


# -- opening


def test_opened_run_is_pending_with_a_message_owed(database: Database) -> None:
    """One transaction writes both."""
    opened(database, new_run("a"))

    run = get(database, "a")
    assert run is not None
    assert (run.state, run.created_at, run.attempts, run.delivered) == (RunState.PENDING, NOW, 0, False)
    assert (run.args, run.kwargs, run.params, run.stands_for) == ([], {"folder": "INBOX"}, {"folder": "INBOX"}, 1)
    assert owed(database) == {"a": "run"}


def test_second_run_of_an_instant_is_not_opened(database: Database) -> None:
    """The instant is unique within its schedule, whatever the id; runs by hand have none."""
    opened(database, new_run("a", schedule_id="sid", scheduled_for=NOW))

    with database.transaction() as tx:
        assert not runs.open_run(tx, new_run("b", schedule_id="sid", scheduled_for=NOW), NOW)
        assert not runs.open_run(tx, new_run("a"), NOW)
        assert runs.open_run(tx, new_run("c", schedule_id="sid", scheduled_for=later(60)), NOW)
        assert runs.open_run(tx, new_run("d", schedule_id="other", scheduled_for=NOW), NOW)
        assert runs.open_run(tx, new_run("e", schedule_id="sid"), NOW)
        assert runs.open_run(tx, new_run("f", schedule_id="sid"), NOW)

    assert sorted(owed(database)) == ["a", "c", "d", "e", "f"]


def test_many_beats_at_once_open_one_run(database: Database) -> None:
    """However many open the same instant at the same moment, one does."""

    def open_one(number: int) -> bool:
        with database.transaction() as tx:
            return runs.open_run(tx, new_run(f"run{number}", schedule_id="sid", scheduled_for=NOW), NOW)

    assert sorted(all_at_once(open_one, range(6))) == [False] * 5 + [True]
    assert len(owed(database)) == 1


def test_many_runs_are_opened_in_one_go(database: Database) -> None:
    """Instants that have a run keep it, and no second message is left for it."""
    opened(database, new_run("old", schedule_id="sid", scheduled_for=NOW))
    with database.transaction() as tx:
        outbox.remove(tx, ["old"])
        tx.execute(runs.runs.update().values(publications=1))

    with database.transaction() as tx:
        new = [
            new_run(f"run{n}", schedule_id="sid", scheduled_for=later(60 * n), schedule_slots=n or None)
            for n in range(4)
        ]
        messages = runs.open_many(tx, new, later(1), later(4))
        assert runs.open_many(tx, [], later(1), later(4)) == []

    assert [item.run_id for item in messages] == ["run1", "run2", "run3"]
    assert owed(database) == {"run1": "run", "run2": "run", "run3": "run"}
    assert get(database, "run0") is None
    assert (row_of(database, "run3").schedule_slots, row_of(database, "run3").created_at) == (3, later(1))
    with database.transaction() as tx:
        assert outbox.take_due(tx, APP, later(3.9), later(4), 10) == []
        assert runs.open_many(tx, new, later(2), later(5)) == []


def test_messages_of_opened_runs_are_those_in_the_outbox(database: Database) -> None:
    """They are made of what was written, not read back: nothing in them differs from what a relay would read."""
    text = 'quotes " and \\ and é and \U0001f600, and what a driver may take for its own: %s %(x)s :x ?'
    full = new_run(
        "full", schedule_id="sid", scheduled_for=NOW, args=json.dumps([text]), queue="mail", priority=2, name=text,
        envelope='{"handed": false}', schedule_slots=2, max_retries=7, stands_for=3, backfilled=True, reason=text,
    )  # fmt: skip
    with database.transaction() as tx:
        messages = runs.open_many(tx, [full, new_run("bare")], NOW, later(3))

    with database.transaction() as tx:
        assert outbox.take_these(tx, ["full", "bare"], later(3)) == messages
    row = row_of(database, "full")
    for column in ("args", "name", "schedule_slots", "max_retries", "stands_for", "backfilled", "reason"):
        assert getattr(row, column) == getattr(full, column)
    assert (row.scheduled_for, row.created_at, row.ended_at, row.delivered) == (NOW, NOW, None, False)


def test_skipped_instant_leaves_its_trace(database: Database) -> None:
    """It is over from the start, told to nobody, and owes no message."""
    with database.transaction() as tx:
        new = new_run("a", schedule_id="sid", scheduled_for=NOW, reason="90 s late", stands_for=3)
        assert runs.record_ended(tx, new, later(90), RunState.SKIPPED)
        assert not runs.record_ended(tx, new, later(90), RunState.SKIPPED)

    run = get(database, "a")
    assert run is not None
    assert (run.state, run.reason, run.ended_at, run.delivered) == (RunState.SKIPPED, "90 s late", later(90), True)
    assert (run.stands_for, run.attempt, owed(database)) == (3, 1, {})


def test_untold_end_is_still_to_be_told(database: Database) -> None:
    """A message that expired or was revoked before anybody knew it ends its run undelivered."""
    with database.transaction() as tx:
        runs.record_untold(tx, new_run("a", reason="expired before it started"), NOW, RunState.SKIPPED)

    row = row_of(database, "a")
    assert (row.state, row.delivered, row.ended_at, row.envelope) == ("skipped", False, NOW, "{}")


def test_unheld_run_is_ended_with_its_message_and_slots(database: Database) -> None:
    """A live run ends without an attempt; one that has ended stays as it is."""
    opened(database, new_run("a"), new_run("b"))
    ended(database, held(database, "b"))

    with database.transaction() as tx:
        for run_id in ("a", "b"):
            runs.end_unheld(tx, run_id, later(2), RunState.CANCELLED, "revoked")

    row = row_of(database, "a")
    assert (row.state, row.reason, row.ended_at, row.delivered) == ("cancelled", "revoked", later(2), False)
    assert state_of(database, "b") is RunState.SUCCEEDED
    assert "a" not in owed(database)


def test_stale_copy_does_not_end_a_run_that_was_begun(database: Database) -> None:
    """What another worker holds goes on; only the owner that gave its attempt up ends it."""
    opened(database, new_run("a"))
    held(database, "a")

    with database.transaction() as tx:
        assert not runs.end_unheld(tx, "a", later(2), RunState.SKIPPED, "expired before it started")
        assert not runs.end_unheld(tx, "a", later(2), RunState.CANCELLED, "terminated", "somebody else")

    assert state_of(database, "a") is RunState.RUNNING

    with database.transaction() as tx:
        assert runs.end_unheld(tx, "a", later(3), RunState.CANCELLED, "terminated", row_of(database, "a").owner)

    assert state_of(database, "a") is RunState.CANCELLED


def test_run_of_a_plain_task_ends_when_it_is_published(database: Database) -> None:
    """The ledger hears no more of it."""
    opened(database, new_run("a"), new_run("b"))
    set_run(database, "a", state=RunState.QUEUED)

    with database.transaction() as tx:
        for run_id in ("a", "b"):
            runs.end_handed(tx, run_id, later(1))

    row = row_of(database, "a")
    assert (row.state, row.reason, row.delivered, row.envelope) == ("skipped", "handed to Celery", True, None)
    assert state_of(database, "b") is RunState.PENDING


# -- reading


def test_run_is_a_value_with_what_people_ask_for(database: Database) -> None:
    """Result and arguments are values; waiting time and attempt are computed."""
    claim = held(database, "a", at=later(1.5), args="[1, 2]", kwargs='{"deep": {"x": [null]}}')
    set_run(database, "a", created_at=NOW)
    running = get(database, "a")
    ended(database, claim, at=later(4), result='{"sent": 3}', run_seconds=2.5)
    run = get(database, "a")

    assert running is not None
    assert run is not None
    assert (running.attempt, running.attempts, running.wait_seconds) == (1, 0, 1.5)
    assert (run.args, run.kwargs, run.result) == ([1, 2], {"deep": {"x": [None]}}, {"sent": 3})
    assert (run.attempt, run.attempts, run.run_seconds, run.ended_at) == (1, 1, 2.5, later(4))
    with pytest.raises(FrozenInstanceError):
        run.state = RunState.FAILED  # type: ignore[misc]


def test_text_that_was_cut_is_shown_as_text(database: Database) -> None:
    """What is left of a long JSON value is readable, not an error."""
    opened(database, new_run("a"))
    set_run(database, "a", args='["xxx', kwargs='{"a": "b', result='"xx')

    run = get(database, "a")

    assert run is not None
    assert (run.args, run.kwargs, run.result) == (['["xxx'], {"...": '{"a": "b'}, '"xx')


def test_unknown_run_is_none(database: Database) -> None:
    """Asking for an id that nobody knows is no error here."""
    assert get(database, "nobody") is None


def test_runs_are_found_newest_first(database: Database) -> None:
    """By state, function, schedule and age, as many as asked for."""
    for number in range(4):
        opened(database, new_run(f"run{number}", schedule_id=f"s{number % 2}"), at=later(number))
    opened(database, new_run("other", func_name="report"), new_run("foreign", app="other"), at=later(9))
    set_run(database, "run1", state=RunState.FAILED)

    def found(**query: object) -> list[str]:
        with database.reading() as connection:
            return [run.id for run in runs.find(connection, APP, **query)]  # type: ignore[arg-type]

    assert found() == ["other", "run3", "run2", "run1", "run0"]
    assert found(limit=2) == ["other", "run3"]
    assert found(states=[RunState.FAILED, RunState.SUCCEEDED]) == ["run1"]
    assert found(func_name="report") == ["other"]
    assert found(schedule_id="s0") == ["run2", "run0"]
    assert found(since=later(3)) == ["other", "run3"]


# -- cancelling


@pytest.mark.parametrize("state", sorted(UNSTARTED))
def test_unstarted_run_is_cancelled_at_once(database: Database, state: RunState) -> None:
    """It never starts: no message is owed, no claim is given, its end is to be told."""
    opened(database, new_run("a"))
    set_run(database, "a", state=state, next_attempt_at=later(60))

    run = cancel(database, "a", "no longer wanted")

    assert run is not None
    assert (run.state, run.reason, run.ended_at) == (RunState.CANCELLED, "no longer wanted", later(1))
    assert (run.delivered, run.next_attempt_at, run.cancel_requested_at) == (False, None, later(1))
    assert owed(database) == {}
    assert held(database, "a", at=later(2)).state is RunState.CANCELLED


def test_running_run_is_asked_to_stop(database: Database) -> None:
    """Its owner ends it; asking again keeps the first request."""
    held(database, "a")

    run = cancel(database, "a", "first")
    cancel(database, "a", "second")

    assert run is not None
    assert (run.state, run.reason, run.cancel_requested_at, run.ended_at) == (
        RunState.RUNNING,
        "first",
        later(1),
        None,
    )
    assert row_of(database, "a").reason == "first"


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED, RunState.SKIPPED, RunState.CANCELLED])
def test_ended_run_is_left_as_it_is(database: Database, state: RunState) -> None:
    """A cancellation that comes too late changes nothing."""
    ended(database, held(database, "a"), state, reason="over")

    run = cancel(database, "a")

    assert run is not None
    assert (run.state, run.reason, run.cancel_requested_at) == (state, "over", None)


def test_unknown_id_is_remembered_as_cancelled(database: Database) -> None:
    """Its message, when it comes, completes the row and does not start."""
    assert cancel(database, "a", "too early") is None
    run = cancel(database, "a", "again")

    assert run is not None
    assert (run.state, run.reason, run.func_name, run.delivered) == (RunState.CANCELLED, "too early", "", False)
    claim = held(database, "a", at=later(2))
    row = row_of(database, "a")
    assert (claim.state, claim.reason, row.func_name, row.name) == (
        RunState.CANCELLED,
        "too early",
        "sync_emails",
        "sync_emails",
    )
    assert row.state == "cancelled"


def test_remembered_cancellation_adopts_its_message(database: Database) -> None:
    """A message that is dropped before a claim completes the row too; a known run is not touched."""
    cancel(database, "a", "too early")
    opened(database, new_run("b"))

    with database.transaction() as tx:
        runs.adopt_message(tx, new_run("a", queue="mail"))
        runs.adopt_message(tx, new_run("b", queue="mail"))

    assert (row_of(database, "a").func_name, row_of(database, "a").queue) == ("sync_emails", "mail")
    assert row_of(database, "a").reason == "too early"
    assert row_of(database, "b").queue is None


def test_runs_of_a_schedule_are_cancelled_together(database: Database) -> None:
    """Unstarted ones end, running ones are asked, ended ones and those of others stay."""
    for run_id in ("new", "running", "over"):
        opened(database, new_run(run_id, schedule_id="sid"))
    opened(database, new_run("other", schedule_id="else"))
    held(database, "running")
    ended(database, held(database, "over"))

    with database.transaction() as tx:
        ids = cancelling.cancel_of_schedule(tx, "sid", later(1), "its Task was cancelled")

    assert ids == ["new", "running"]
    assert [state_of(database, item) for item in ("new", "running", "over", "other")] == [
        "cancelled",
        "running",
        "succeeded",
        "pending",
    ]
    assert row_of(database, "running").cancel_requested_at == later(1)
    assert owed(database).keys() == {"running", "over", "other"}


def test_more_runs_than_a_statement_has_parameters_are_cancelled(tmp_path: Path) -> None:
    """A schedule whose runs piled up is cancelled with all of them."""
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")
    with database.transaction() as tx:
        runs.open_many(tx, [new_run(f"run{n}", schedule_id="sid") for n in range(33_000)], NOW, later(3))
        assert len(cancelling.cancel_of_schedule(tx, "sid", later(1), "its Task was cancelled")) == 33_000

    assert owed(database) == {}
    assert state_of(database, "run32999") is RunState.CANCELLED
    database.close()


def test_cancel_and_end_at_once_lose_no_request(database: Database) -> None:
    """However they interleave, a run whose cancellation was asked for does not go on to another attempt."""
    for number in range(10):
        run_id = f"run{number}"
        claim = held(database, run_id)

        def act(what: str, run_id: str = run_id, claim: object = claim) -> None:
            if what == "cancel":
                cancel(database, run_id)
            else:
                ended(database, claim, RunState.RETRYING, next_attempt_at=later(9))  # type: ignore[arg-type]

        all_at_once(act, ["cancel", "end"])

        assert state_of(database, run_id) is RunState.CANCELLED


# -- purging


def test_purge_deletes_old_delivered_ends_only(database: Database) -> None:
    """Live runs, ends that Celery was not told, and young ones stay, however old the others are."""
    for run_id in ("old", "untold", "young", "report"):
        func_name = "report" if run_id == "report" else "sync_emails"
        claim = held(database, run_id, func_name=func_name)
        ended(database, claim, at=later(99 if run_id == "young" else 1), delivered=run_id != "untold")
    opened(database, new_run("pending"), new_run("waiting"), new_run("foreign", app="other"))
    set_run(database, "waiting", state=RunState.WAITING)
    set_run(database, "foreign", state=RunState.FAILED, ended_at=NOW, delivered=True)
    cancel(database, "never-came")

    with database.transaction() as tx:
        assert purging.purgeable(tx, APP, later(50)) == 3
        assert purging.purge_slice(tx, APP, later(50), func_name="report") == 1
        assert purging.purge_slice(tx, APP, later(50)) == 2
        assert purging.purge_slice(tx, APP, later(50)) == 0

    for run_id in ("old", "report", "never-came"):
        assert get(database, run_id) is None
    for run_id in ("untold", "young", "pending", "waiting", "foreign"):
        assert get(database, run_id) is not None


def test_purge_goes_in_slices(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One transaction deletes a bounded number of rows, the oldest first."""
    monkeypatch.setattr(purging, "SLICE", 2)
    for number in range(5):
        ended(database, held(database, f"run{number}"), at=later(number), delivered=True)

    slices = purging.purge(database, APP, later(50))
    assert next(slices) == 2
    assert get(database, "run1") is None
    assert get(database, "run2") is not None

    assert list(slices) == [2, 1]
