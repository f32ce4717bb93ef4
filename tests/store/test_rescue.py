"""What keepers write: nothing that was accepted stands still, and nothing is done twice."""

from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import event, insert

from llmtasks.states import RunState
from llmtasks.store import cancelling, outbox, rescue, rows
from llmtasks.store.database import Database
from tests.conftest import SERVERS, on
from tests.store.plans import analyze, plan_of
from tests.store.rows_of import (
    APP,
    LEASE,
    NOW,
    all_at_once,
    claimed,
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


def lose(database: Database, at: float = 13) -> list[str]:
    with database.transaction() as tx:
        return rescue.lose_silent(tx, APP, later(at) - LEASE, later(at), '{"exc_type": "WorkerLostError"}')


def test_silent_run_is_dispatched_again(database: Database) -> None:
    """Its attempt counts as one that ended, its owner holds it no longer, a message is owed."""
    held(database, "a")

    assert lose(database, 12) == []
    assert lose(database, 13) == ["a"]
    assert lose(database, 14) == []

    row = row_of(database, "a")
    assert (row.state, row.attempts, row.losses, row.owner, row.heartbeat_at) == ("pending", 1, 1, None, None)
    assert (row.ended_at, row.delivered) == (None, False)
    assert "stopped answering" in row.error
    assert owed(database) == {"a": "run"}
    assert claimed(database, "a", attempts=0) is None  # the lost worker's own message, redelivered
    assert held(database, "a", attempts=1).claim_no == 2


def test_run_that_is_stamped_is_not_lost(database: Database) -> None:
    """Only silence loses a run."""
    held(database, "a")
    set_run(database, "a", heartbeat_at=later(5))

    assert lose(database, 16) == []


def test_run_lost_in_its_last_attempt_has_failed(database: Database) -> None:
    """A run that kills its worker each time ends, and its end is to be told."""
    held(database, "a", max_retries=1)
    lose(database)
    held(database, "a", at=later(20), attempts=1)

    assert lose(database, 40) == []

    row = row_of(database, "a")
    assert (row.state, row.attempts, row.losses, row.ended_at) == ("failed", 2, 2, later(40))
    assert (row.delivered, row.failure) == (False, '{"exc_type": "WorkerLostError"}')
    assert row.error == row.reason


def test_lost_run_with_a_cancel_request_is_cancelled(database: Database) -> None:
    """It was to stop anyway: it is not dispatched again, whatever attempts it has left."""
    held(database, "a")
    with database.transaction() as tx:
        cancelling.cancel(tx, APP, "a", later(1), "no longer wanted")

    assert lose(database) == []

    row = row_of(database, "a")
    assert (row.state, row.reason, row.ended_at, row.delivered) == ("cancelled", "no longer wanted", later(13), False)


@on(*SERVERS)
@pytest.mark.parametrize("zone", ["+09:00", "-05:00"])
def test_zone_of_the_connection_shifts_nothing(database: Database, zone: str) -> None:
    """A server or user with a time zone of its own stores and returns the same instants."""
    held(database, "a", max_retries=0)
    with database.transaction() as tx:
        local = {
            "postgresql": f"SET LOCAL TIME ZONE INTERVAL '{zone}' HOUR TO MINUTE",
            "mysql": f"SET time_zone = '{zone}'",
        }
        tx.exec_driver_sql(local[tx.dialect.name])
        rescue.lose_silent(tx, APP, later(1), later(13), "{}")

    assert row_of(database, "a").ended_at == later(13)


def test_lost_run_can_be_delayed(database: Database) -> None:
    """After a hard limit the next attempt must not overlap with a child that is still dying."""
    held(database, "a")

    with database.transaction() as tx:
        here = rescue.owned_by("host/one", "a")
        pending = rescue.lose(tx, here, later(1), error="TimeLimitExceeded", failure="{}", delay=timedelta(seconds=1))

    row = row_of(database, "a")
    assert pending == []
    assert (row.state, row.next_attempt_at, row.attempts) == ("retrying", later(2), 1)


def test_dead_childs_run_is_only_lost_where_it_was_its_own(database: Database) -> None:
    """The main process names the child; a run that another holds by now is not touched."""
    held(database, "a", owner="host/two")

    with database.transaction() as tx:
        assert rescue.lose(tx, rescue.owned_by("host/one", "a"), later(1), error="x", failure="{}") == []
        assert rescue.state_of(tx, "a") is RunState.RUNNING
        assert rescue.state_of(tx, "unknown") is None


def test_many_keepers_at_once_lose_a_run_once(database: Database) -> None:
    """However many look at the same moment, an attempt is counted once and one message is owed."""
    ids = [f"run{n}" for n in range(8)]
    for run_id in ids:
        held(database, run_id)

    found = all_at_once(lambda _: lose(database), range(4))

    assert sorted(run_id for part in found for run_id in part) == ids
    assert {row_of(database, run_id).attempts for run_id in ids} == {1}
    assert owed(database) == dict.fromkeys(ids, "run")


def test_due_retries_are_started(database: Database) -> None:
    """At its time a retrying run is pending with a message owed; not before, and not twice."""
    for number in range(3):
        ended(database, held(database, f"run{number}"), RunState.RETRYING, next_attempt_at=later(10 * (3 - number)))

    with database.transaction() as tx:
        assert rescue.start_retries(tx, APP, later(9.9)) == []
        assert rescue.start_retries(tx, APP, later(20)) == ["run2", "run1"]
        assert rescue.start_retries(tx, APP, later(20)) == []

    assert owed(database) == {"run1": "run", "run2": "run"}
    assert (state_of(database, "run1"), row_of(database, "run1").next_attempt_at) == (RunState.PENDING, None)


def test_untold_ends_are_sent_for_delivery(database: Database) -> None:
    """Those that nobody holds; sent again after a while; never those that were told or that an owner is telling."""
    ended(database, held(database, "free"))
    ended(database, held(database, "told"), delivered=True)
    ended(database, held(database, "busy"), keeps_owner=True)
    held(database, "running")
    with database.transaction() as tx:
        cancelling.cancel(tx, APP, "never-came", NOW, "cancelled")

    def send(at: float) -> list[str]:
        with database.transaction() as tx:
            return rescue.send_ends(tx, APP, later(at) - LEASE, later(at))

    assert send(1) == ["free"]
    assert send(2) == []
    assert owed(database) == {"free": "deliver"}
    assert send(11.5) == ["free"]
    assert sorted(send(22)) == ["busy", "free"]


def test_end_that_nobody_tells_is_sent_ever_more_seldom(database: Database) -> None:
    """Twice as long after each publication, up to ten minutes: a backlog of ends does not flood the broker."""
    opened(database, new_run("a"))
    publish(database, "a")
    ended(database, held(database, "a"))
    sent: list[int] = []

    for second in range(1, 3000):
        with database.transaction() as tx:
            again = rescue.send_ends(tx, APP, later(second) - LEASE, later(second))
        if again:
            sent.append(second)
            publish(database, "a", at=later(second))

    assert [after - before for before, after in pairwise(sent)] == [11, 21, 41, 81, 161, 321, 641, 641, 641]


def test_end_that_no_broker_took_is_not_put_off(database: Database) -> None:
    """While the broker is away its message stays owed."""
    ended(database, held(database, "a"))

    for at in (1, 12, 23, 34):
        with database.transaction() as tx:
            assert rescue.send_ends(tx, APP, later(at) - LEASE, later(at)) == ["a"]
    assert owed(database) == {"a": "deliver"}


def test_requeued_run_is_looked_at_as_any_queued_one(database: Database) -> None:
    """A run that its caller sent is known from its first start on, and is not lost when it is put back."""
    ended(database, held(database, "a"), RunState.QUEUED, at=later(5), counts=False)

    assert row_of(database, "a").published_at == later(5)
    with database.reading() as connection:
        assert rescue.queued_long(connection, APP, later(36)) == [("a", "sync_emails", "celery", False)]


def test_replaced_run_is_looked_at_without_an_envelope(database: Database) -> None:
    """Its replacement says all that its message needs."""
    opened(database, new_run("a"), new_run("b"))
    publish(database, "a", "b")
    set_run(database, "a", envelope=None, replacement="{}")
    set_run(database, "b", envelope=None)

    with database.reading() as connection:
        assert [row[0] for row in rescue.queued_long(connection, APP, later(31))] == ["a"]


def test_abandoned_end_is_sent_at_once(database: Database) -> None:
    """The main process saw its child die between the end and the telling."""
    ended(database, held(database, "a"), keeps_owner=True)

    with database.transaction() as tx:
        rescue.abandon_end(tx, "host/two", "a")
        assert rescue.send_ends(tx, APP, NOW, later(1)) == []
        rescue.abandon_end(tx, "host/one", "a")
        assert rescue.send_ends(tx, APP, NOW, later(1)) == ["a"]


def test_released_run_is_queued_and_uncounted(database: Database) -> None:
    """A shutdown spends no attempt; another owner's run is not released."""
    held(database, "a")

    with database.transaction() as tx:
        assert rescue.release(tx, "host/two", "a", later(1)) == (False, [])
        assert rescue.release(tx, "host/one", "a", later(1)) == (True, [])

    row = row_of(database, "a")
    assert (row.state, row.attempts, row.owner, row.published_at) == ("queued", 0, None, later(1))
    assert held(database, "a", at=later(2), attempts=0).claim_no == 2


def test_queued_runs_are_looked_at_after_a_while(database: Database) -> None:
    """After 30 s if their queue is empty; in any case after 10, 20, 40 minutes, by the number of publications."""
    opened(database, new_run("a", queue="mail"), new_run("b"))
    publish(database, "a", "b")
    set_run(database, "b", publications=3)

    def queued(at: float) -> list[tuple[str, str | None, bool]]:
        with database.reading() as connection:
            found = sorted(rescue.queued_long(connection, APP, later(at)))
        return [(run_id, queue, overdue) for run_id, _, queue, overdue in found]

    assert queued(30) == []
    assert queued(31) == [("a", "mail", False), ("b", None, False)]
    assert queued(601) == [("a", "mail", True), ("b", None, False)]
    assert queued(2401) == [("a", "mail", True), ("b", None, True)]


def test_republished_run_keeps_its_attempt(database: Database) -> None:
    """Sending again is no attempt; what was claimed meanwhile is left alone."""
    opened(database, new_run("a"), new_run("b"))
    publish(database, "a", "b")
    held(database, "b")

    with database.transaction() as tx:
        rescue.republish(tx, APP, ["a", "b"], later(700))
        rescue.republish(tx, APP, [], later(700))

    assert owed(database) == {"a": "run"}
    assert (state_of(database, "a"), state_of(database, "b")) == (RunState.PENDING, RunState.RUNNING)
    publish(database, "a", at=later(701))
    row = row_of(database, "a")
    assert (row.state, row.attempts, row.publications, row.published_at) == ("queued", 0, 2, later(701))


def test_keepers_at_work_together_wait_for_nobody(database: Database) -> None:
    """Rescue, retries, promotion, deliveries and relays of several keepers, beside claims and ends: none is refused."""
    ids = [f"run{number:02}" for number in range(24)]
    opened(database, *(new_run(run_id) for run_id in ids))

    def keep(number: int) -> None:
        for turn in range(6):
            at = later(20 * turn)
            if number < 2:
                with database.transaction() as tx:
                    rescue.lose_silent(tx, APP, at - LEASE, at, "{}")
                with database.transaction() as tx:
                    rescue.start_retries(tx, APP, at)
                with database.transaction() as tx:
                    rescue.promote(tx, APP, at)
                with database.transaction() as tx:
                    rescue.send_ends(tx, APP, at - LEASE, at)
                with database.transaction() as tx:
                    messages = outbox.take_due(tx, APP, at, at + timedelta(seconds=3), 100)
                with database.transaction() as tx:
                    outbox.published(tx, messages, at)
            else:
                for run_id in ids[number::3]:
                    row = row_of(database, run_id)
                    claim = claimed(database, run_id, at=at, attempts=row.attempts, function_slots=2)
                    if claim is not None and claim.state is RunState.RUNNING:
                        retry = RunState.RETRYING if turn % 2 else RunState.SUCCEEDED
                        ended(database, claim, retry, at=at, next_attempt_at=at if turn % 2 else None)

    all_at_once(keep, range(5))

    assert {state_of(database, run_id) for run_id in ids} <= set(RunState)


def test_keepers_do_not_read_what_is_over(database: Database) -> None:
    """Each look of a keeper goes by the index of open runs, or of what is owed, however long the ledger is."""
    over = [
        {
            "id": f"over{number}", "app": APP, "func_name": "f", "name": "f", "state": "succeeded", "priority": 5,
            "created_at": NOW, "ended_at": NOW, "delivered": True,
        }
        for number in range(20_000)
    ]  # fmt: skip
    with database.transaction() as tx:
        tx.execute(insert(rows.runs), over)
    analyze(database, "llmtasks_runs")
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            seen.append((statement, parameters))

    with database.transaction() as tx:
        event.listen(tx, "before_cursor_execute", note)
        rescue.lose_silent(tx, APP, NOW, NOW, "{}")
        rescue.start_retries(tx, APP, NOW)
        rescue.promote(tx, APP, NOW)
        rescue.send_ends(tx, APP, NOW, NOW)
        rescue.queued_long(tx, APP, NOW)
        outbox.take_due(tx, APP, NOW, NOW, 10)
        event.remove(tx, "before_cursor_execute", note)

        assert len(seen) == 7
        for statement, parameters in seen:
            plan = plan_of(tx, statement, parameters)
            assert "llmtasks_runs" not in plan.scanned, (statement, plan)
            assert plan.indexes & {"ix_llmtasks_runs_open", "ix_llmtasks_outbox_available"}, (statement, plan)


def work(database: Database, at: float) -> set[str]:
    """The steps for which a keeper's look finds something."""
    with database.reading() as connection:
        found = rescue.work(connection, APP, later(at) - LEASE, later(at))
    return {name for name in rescue.Work.__dataclass_fields__ if getattr(found, name)}


def test_look_finds_nothing_where_nothing_is_to_be_done(database: Database) -> None:
    """Queued and running runs, ends that were told and ends whose owner is about to tell them need no keeper."""
    opened(database, new_run("queued"))
    publish(database, "queued")
    held(database, "running")
    ended(database, held(database, "told"), delivered=True)
    ended(database, held(database, "kept"), keeps_owner=True)

    assert work(database, 1) == set()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"state": RunState.RUNNING, "owner": "host/two", "heartbeat_at": NOW}, "lost"),
        ({"state": RunState.RETRYING, "next_attempt_at": later(13)}, "retries"),
        ({"state": RunState.WAITING}, "waiting"),
        ({"state": RunState.SUCCEEDED, "ended_at": NOW}, "untold"),
        ({"state": RunState.FAILED, "ended_at": NOW, "owner": "host/two", "heartbeat_at": NOW}, "untold"),
    ],
)
def test_look_finds_what_a_step_would(database: Database, values: dict[str, Any], found: str) -> None:
    """Each step's work is seen by the look that comes before it; of other apps it sees nothing."""
    opened(database, new_run("a"), new_run("b", app="another"))
    set_run(database, "a", **values)
    set_run(database, "b", **values)

    assert work(database, 13) == {found}
    set_run(database, "a", delivered=True)
    assert work(database, 13) == set()
