"""The outbox: every message is owed until the broker has it, and sent by one relay at a time."""

from datetime import datetime

from sqlalchemy import select

from llmtasks.message import DELIVER, Message
from llmtasks.states import RunState
from llmtasks.store import outbox, rows, runs
from llmtasks.store.database import Database
from tests.store.rows_of import (
    APP,
    NOW,
    ended,
    held,
    later,
    new_run,
    opened,
    owed,
    publish,
    row_of,
    set_run,
    state_of,
)


def take(database: Database, at: datetime = NOW, until: datetime = later(3), limit: int = 10) -> list[Message]:
    with database.transaction() as tx:
        return outbox.take_due(tx, APP, at, until, limit)


def test_message_says_what_sending_needs(database: Database) -> None:
    """It has the run's arguments, envelope, route and count of attempts."""
    opened(database, new_run("a", queue="mail", priority=3, schedule_id="sid"))

    (message,) = take(database)

    assert message == Message(
        run_id="a",
        kind="run",
        app=APP,
        func_name="sync_emails",
        args="[]",
        kwargs='{"folder": "INBOX"}',
        envelope="{}",
        queue="mail",
        priority=3,
        attempts=0,
        replacement=None,
        schedule_id="sid",
        reserved_until=later(3),
    )
    assert not message.delivers


def test_taken_message_is_reserved_for_a_while(database: Database) -> None:
    """Nobody else sends it before its time; then anybody does."""
    opened(database, new_run("a"))

    assert len(take(database)) == 1
    assert take(database, at=later(2.9)) == []
    assert len(take(database, at=later(3), until=later(6))) == 1


def test_messages_are_taken_in_the_order_of_their_times(database: Database) -> None:
    """The oldest first, as many as asked for, and none before its time."""
    for number in (2, 0, 1, 3):
        opened(database, new_run(f"run{number}"), at=later(number))

    assert [item.run_id for item in take(database, at=later(2), limit=2)] == ["run0", "run1"]
    assert [item.run_id for item in take(database, at=later(2))] == ["run2"]


def test_message_for_later_waits(database: Database) -> None:
    """A delayed run is in the outbox from the start and is not due before its time."""
    with database.transaction() as tx:
        runs.open_run(tx, new_run("a"), NOW, later(60))

    with database.reading() as connection:
        assert not outbox.is_due(connection, APP, later(59))
        assert outbox.is_due(connection, APP, later(60))
        assert not outbox.is_due(connection, "other", later(60))


def test_published_run_is_queued(database: Database) -> None:
    """Its message is owed no more; when and how often it was published is known."""
    opened(database, new_run("a"), new_run("b"))

    publish(database, "a", at=later(1))

    row = row_of(database, "a")
    assert (row.state, row.published_at, row.publications, row.replacement) == ("queued", later(1), 1, None)
    assert owed(database) == {"b": "run"}
    assert state_of(database, "b") is RunState.PENDING


def test_mark_that_a_claim_outran_changes_no_state(database: Database) -> None:
    """A worker may have the run before its publication is written down."""
    opened(database, new_run("a"), new_run("b"))
    with database.transaction() as tx:
        messages = outbox.take_these(tx, ["a", "b"], later(3))
    held(database, "a")
    ended(database, held(database, "b"), delivered=True)

    with database.transaction() as tx:
        outbox.published(tx, messages, later(1))

    assert (state_of(database, "a"), state_of(database, "b")) == (RunState.RUNNING, RunState.SUCCEEDED)
    assert owed(database) == {}


def test_message_put_again_meanwhile_stays(database: Database) -> None:
    """What a relay publishes is the message that it took; a newer one for the same run is still owed."""
    opened(database, new_run("a"))
    (message,) = take(database)
    with database.transaction() as tx:
        outbox.put(tx, APP, ["a"], later(1))

    with database.transaction() as tx:
        outbox.published(tx, [message], later(2))

    assert owed(database) == {"a": "run"}
    assert (state_of(database, "a"), row_of(database, "a").publications) == (RunState.PENDING, 0)


def test_publishing_twice_counts_once(database: Database) -> None:
    """A relay whose reservation ran out while it published is not counted a second time."""
    opened(database, new_run("a"))
    (message,) = take(database)

    for _ in range(2):
        with database.transaction() as tx:
            outbox.published(tx, [message], later(1))

    assert row_of(database, "a").publications == 1


def test_run_owes_one_message(database: Database) -> None:
    """Putting again keeps one row, with the new kind and time."""
    opened(database, new_run("a"))

    with database.transaction() as tx:
        outbox.put(tx, APP, ["a"], later(9), DELIVER)

    with database.reading() as connection:
        (row,) = connection.execute(select(rows.outbox))
    assert (row.run_id, row.app, row.kind, row.available_at) == ("a", APP, "deliver", later(9))


def test_delivery_is_owed_and_timed(database: Database) -> None:
    """The message that tells an end says so, and the run knows when it was sent."""
    ended(database, held(database, "a"))

    with database.transaction() as tx:
        outbox.deliver(tx, APP, "a", later(2))

    (message,) = take(database, at=later(2), until=later(5))
    assert message.delivers
    assert row_of(database, "a").delivery_sent_at == later(2)


def test_requeued_run_is_pending_and_reserved(database: Database) -> None:
    """A run whose owner gave it up is sent again by the caller, or by any relay after a while."""
    ended(database, held(database, "a"), RunState.QUEUED, counts=False)

    with database.transaction() as tx:
        (message,) = outbox.requeue(tx, APP, "a", later(1), later(4))

    assert (message.run_id, message.reserved_until) == ("a", later(4))
    assert state_of(database, "a") is RunState.PENDING
    assert take(database, at=later(3)) == []


def test_unowed_runs_are_pending_and_have_no_message(database: Database) -> None:
    """A run that was published before, that has ended, or whose message is there gets no second one."""
    opened(database, new_run("new"), new_run("sent"), new_run("over"), new_run("owed"))
    publish(database, "sent")
    set_run(database, "over", state=RunState.CANCELLED)
    with database.transaction() as tx:
        outbox.remove(tx, ["new", "sent", "over"])

    with database.transaction() as tx:
        assert outbox.unowed(tx, ["new", "sent", "over", "owed", "unknown"]) == {"new"}


def test_new_messages_have_their_own_times(database: Database) -> None:
    """One that is there already stays as it is."""
    opened(database, new_run("a"), new_run("b"))
    with database.transaction() as tx:
        outbox.remove(tx, ["a"])

    with database.transaction() as tx:
        outbox.put_new(tx, APP, {"a": later(1), "b": later(1)})

    assert [item.run_id for item in take(database)] == ["b"]
    assert [item.run_id for item in take(database, at=later(1))] == ["a"]


def test_publications_where_delete_returns_nothing(database: Database) -> None:
    """On MySQL, which has no RETURNING, the rows are locked and read before they go."""
    opened(database, new_run("a"), new_run("b"))
    messages = take(database)
    with database.transaction() as tx:
        outbox.put(tx, APP, ["b"], later(1))

    with database.transaction() as tx:
        able, tx.dialect.delete_returning = tx.dialect.delete_returning, False
        try:
            outbox.published(tx, messages, later(2))
        finally:
            tx.dialect.delete_returning = able

    assert able
    assert owed(database) == {"b": "run"}
    assert (state_of(database, "a"), state_of(database, "b")) == (RunState.QUEUED, RunState.PENDING)


def test_two_relays_take_different_messages(database: Database) -> None:
    """Each passes over what the other has locked; on SQLite the second waits and finds the first's reservation."""
    opened(database, *(new_run(f"run{n}") for n in range(6)))

    with database.transaction() as one:
        first = outbox.take_due(one, APP, NOW, later(3), 4)
        if database.is_sqlite:
            second = []
        else:
            with database.transaction() as two:
                second = outbox.take_due(two, APP, NOW, later(4), 4)
    if database.is_sqlite:
        second = take(database)

    assert (len(first), len(second)) == (4, 2)
    assert not {item.run_id for item in first} & {item.run_id for item in second}


def test_nothing_taken_and_nothing_published_is_nothing(database: Database) -> None:
    """Empty lists are fine."""
    with database.transaction() as tx:
        assert outbox.take_due(tx, APP, NOW, later(3), 10) == []
        assert outbox.take_these(tx, [], later(3)) == []
        outbox.put(tx, APP, [], NOW)
        outbox.put_new(tx, APP, {})
        outbox.published(tx, [], NOW)
        outbox.remove(tx, [])
    assert owed(database) == {}


def test_these_come_in_the_order_asked_for(database: Database) -> None:
    """What a caller opened is sent in its order; what is unknown is left out."""
    opened(database, *(new_run(item) for item in "abc"))

    with database.transaction() as tx:
        found = outbox.take_these(tx, ["c", "x", "a"], later(3))

    assert [item.run_id for item in found] == ["c", "a"]
