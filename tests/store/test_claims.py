"""Claims: who may run what, and who may still write about it."""

import multiprocessing
from typing import Any

import pytest

from llmtasks.states import RunState
from llmtasks.store import cancelling, claims, rescue
from llmtasks.store import held as holding
from llmtasks.store.database import Database
from llmtasks.store.ends import End
from llmtasks.store.held import Delivered
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
    offer,
    opened,
    owed,
    publish,
    row_of,
    set_run,
    state_of,
)


def test_message_of_delay_inserts_its_run(database: Database) -> None:
    """The claim of a run that the ledger does not know records it, with everything the message said."""
    claim = held(database, "a", queue="mail", priority=2, max_retries=7)

    row = row_of(database, "a")
    assert (claim.claim_no, claim.state, claim.attempts, claim.max_retries) == (1, RunState.RUNNING, 0, 7)
    assert (row.state, row.owner, row.worker, row.name) == ("running", "host/one", "celery@host", "sync_emails")
    assert (row.args, row.envelope, row.queue, row.priority) == ("[1]", '{"link": null}', "mail", 2)
    assert row.created_at == row.started_at == row.attempt_started_at == row.heartbeat_at == NOW
    assert not row.delivered


def test_claim_of_an_opened_run_keeps_its_arguments(database: Database) -> None:
    """What a schedule wrote stays; the claim adds who runs it and what only the message knows."""
    opened(database, new_run("a", name="nightly", max_retries=0, priority=1))

    claim = held(database, "a", at=later(2), max_retries=3, retry_delay=9.0)

    row = row_of(database, "a")
    assert (row.kwargs, row.args, row.name, row.max_retries) == ('{"folder": "INBOX"}', "[]", "nightly", 0)
    assert (row.retry_delay, row.envelope, row.queue, row.priority) == (9.0, '{"link": null}', "celery", 1)
    assert (claim.claim_no, claim.created_at, row.started_at) == (1, NOW, later(2))


def test_sender_whose_clock_is_ahead_does_not_date_a_run_after_its_start(database: Database) -> None:
    """The database's clock counts; what was sent before is as old as its sender says."""
    assert held(database, "ahead", created_at=later(300)).created_at == NOW
    assert held(database, "behind", created_at=later(-300)).created_at == later(-300)


@pytest.mark.parametrize("state", [RunState.PENDING, RunState.QUEUED])
def test_unstarted_run_is_claimed_once(database: Database, state: RunState) -> None:
    """A second copy of its message is refused while it runs."""
    opened(database, new_run("a"))
    set_run(database, "a", state=state)

    first, second = claimed(database, "a"), claimed(database, "a", owner="host/two")

    assert first is not None
    assert second is None
    assert row_of(database, "a").owner == "host/one"


@pytest.mark.parametrize("state", [RunState.WAITING, RunState.RETRYING, RunState.RUNNING])
def test_claim_of_what_only_a_keeper_moves_is_refused(database: Database, state: RunState) -> None:
    """A run that waits, retries later or runs is started by nobody's message, however silent its owner."""
    opened(database, new_run("a"))
    set_run(database, "a", state=state, heartbeat_at=later(-1000))

    assert claimed(database, "a") is None
    assert row_of(database, "a").claim_no == 0


def test_stale_copy_is_refused(database: Database) -> None:
    """A message that was sent before the last attempt ended does not start the next one."""
    held_claim = held(database, "a")
    ended(database, held_claim, RunState.RETRYING, next_attempt_at=later(1))
    with database.transaction() as tx:
        rescue.start_retries(tx, APP, later(1))

    assert claimed(database, "a", attempts=0) is None
    assert held(database, "a", attempts=1).claim_no == 2


def test_ended_and_delivered_run_is_never_claimed(database: Database) -> None:
    """What is over and told stays so, even for a later message."""
    ended(database, held(database, "a"), delivered=True)

    assert claimed(database, "a", at=later(1000), attempts=9) is None


def test_undelivered_end_is_replayed_only_when_nobody_holds_it(database: Database) -> None:
    """Its owner keeps it while it stamps; silent for a lease, the end goes to whoever claims it."""
    ended(database, held(database, "a"), keeps_owner=True, result="41")

    assert claimed(database, "a", at=later(12), owner="host/two") is None
    replay = held(database, "a", at=later(12.5), owner="host/two")

    assert (replay.state, replay.result, replay.claim_no) == (RunState.SUCCEEDED, "41", 2)
    row = row_of(database, "a")
    assert (row.state, row.owner, row.started_at, row.attempts) == ("succeeded", "host/two", NOW, 1)


def test_end_that_its_owner_let_go_is_replayed_at_once(database: Database) -> None:
    """Letting go says that Celery could not be told; the lease is not waited for."""
    claim = held(database, "a")
    ended(database, claim, RunState.FAILED, keeps_owner=True, failure='{"exc_type": "KeyError"}')
    with database.transaction() as tx:
        holding.let_go(tx, "a", claim.claim_no)

    replay = held(database, "a", at=later(1), attempts=0)

    assert (replay.state, replay.failure) == (RunState.FAILED, '{"exc_type": "KeyError"}')


def test_late_owner_writes_nothing(database: Database) -> None:
    """An owner that lost its run cannot end it, remark on it, count a callback, let it go, or mark it delivered."""
    late = held(database, "a")
    with database.transaction() as tx:
        rescue.lose_silent(tx, APP, later(13), later(13), "{}")
    winner = held(database, "a", at=later(14), owner="host/two", attempts=1)
    ended(database, winner, keeps_owner=True, result="2")

    assert ended(database, late, result="1") == (False, [])
    with database.transaction() as tx:
        holding.remark(tx, "a", late.claim_no, "late")
        holding.count_callback(tx, "a", late.claim_no)
        holding.let_go(tx, "a", late.claim_no)
        holding.mark_delivered(tx, [Delivered(run_id="a", claim=late.claim_no, keep=100)])

    row = row_of(database, "a")
    assert (row.result, row.reason, row.callback_calls, row.owner, row.delivered) == ("2", None, 0, "host/two", False)


def test_end_is_written_once(database: Database) -> None:
    """A second end of the same claim changes nothing: the run is not running any more."""
    claim = held(database, "a")

    assert ended(database, claim, result="1") == (True, [])
    assert ended(database, claim, RunState.FAILED, error="x") == (False, [])
    assert (state_of(database, "a"), row_of(database, "a").attempts) == (RunState.SUCCEEDED, 1)


def test_end_records_the_whole_outcome(database: Database) -> None:
    """Times, measures and texts of the attempt are in the row."""
    claim = held(database, "a")

    how = {"error": "KeyError: 'x'", "failure": "{}", "traceback": "Traceback...", "reason": "KeyError: 'x'"}
    ended(
        database,
        claim,
        RunState.FAILED,
        at=later(5),
        keeps_owner=True,
        run_seconds=4.5,
        cpu_seconds=0.25,
        peak_memory=3_000_000_000,
        **how,
    )

    row = row_of(database, "a")
    assert {name: getattr(row, name) for name in how} == how
    assert (row.run_seconds, row.cpu_seconds, row.peak_memory) == (4.5, 0.25, 3_000_000_000)
    assert (row.ended_at, row.heartbeat_at, row.owner, row.attempts) == (later(5), later(5), "host/one", 1)
    assert (row.delivered, row.next_attempt_at) == (False, None)


def test_text_that_a_database_refuses_is_spelled_out(database: Database) -> None:
    """NUL and lone surrogates in an error's message must not make the run impossible to end."""
    claim = held(database, "a")

    ours, _ = ended(database, claim, RunState.FAILED, error="bad \0 byte", traceback="\udcff", reason="a\0")

    row = row_of(database, "a")
    assert ours
    assert (row.error, row.traceback, row.reason) == ("bad \\0 byte", "\\udcff", "a\\0")


def test_long_texts_of_every_alphabet_are_kept_whole(database: Database) -> None:
    """Arguments and results of some hundred kilobytes, of characters of four bytes too, come back as they were."""
    long = '"' + "龍💥" * 50_000 + '"'
    claim = held(database, "a", args=f"[{long}]")

    ended(database, claim, RunState.FAILED, result=long, error="💥", failure=long, traceback=long)

    row = row_of(database, "a")
    assert (row.args, row.result, row.failure, row.traceback) == (f"[{long}]", long, long, long)
    assert row.error == "💥"


def test_ids_that_differ_by_case_are_two_runs(database: Database) -> None:
    """Whatever a server thinks of letters by default."""
    upper, lower = held(database, "A"), held(database, "a")

    assert (upper.id, lower.id) == ("A", "a")


def test_retrying_run_keeps_the_time_of_its_next_attempt(database: Database) -> None:
    """The attempt counts, nobody holds the run, and it has not ended; changed arguments take effect."""
    claim = held(database, "a")

    ended(database, claim, RunState.RETRYING, next_attempt_at=later(60), args="[2]", reason="attempt 1 ended")

    row = row_of(database, "a")
    assert (row.state, row.attempts, row.owner, row.ended_at) == ("retrying", 1, None, None)
    assert (row.next_attempt_at, row.args, row.kwargs, row.reason) == (later(60), "[2]", "{}", "attempt 1 ended")


@pytest.mark.parametrize("state", [RunState.RETRYING, RunState.QUEUED])
def test_run_with_a_cancel_request_has_no_next_attempt(database: Database, state: RunState) -> None:
    """It is given up where it would have gone on, with the reason that was asked for, to be told."""
    claim = held(database, "a")
    with database.transaction() as tx:
        cancelling.cancel(tx, APP, "a", later(1), "no longer wanted")

    ended(database, claim, state, at=later(2), next_attempt_at=later(60), reason="attempt 1 ended")

    row = row_of(database, "a")
    assert (row.state, row.reason, row.ended_at) == ("cancelled", "no longer wanted", later(2))
    assert (row.delivered, row.next_attempt_at, row.owner) == (False, None, None)


def test_run_that_ends_well_despite_a_cancel_request_has_succeeded(database: Database) -> None:
    """A request that came too late undoes nothing."""
    claim = held(database, "a")
    with database.transaction() as tx:
        cancelling.cancel(tx, APP, "a", later(1), "no longer wanted")

    ended(database, claim, keeps_owner=True, result="1")

    assert state_of(database, "a") is RunState.SUCCEEDED


def test_replacement_begins_with_its_first_attempt(database: Database) -> None:
    """Another function takes the run's place and brings its own message."""
    ended(database, held(database, "a"), RunState.RETRYING, next_attempt_at=later(1))
    with database.transaction() as tx:
        rescue.start_retries(tx, APP, later(1))
    claim = held(database, "a", attempts=1)

    ended(database, claim, RunState.QUEUED, counts=False, replacement='{"task": "other"}')

    row = row_of(database, "a")
    assert (row.state, row.attempts, row.envelope, row.replacement) == ("queued", 0, None, '{"task": "other"}')
    other = held(database, "a", func_name="other", args="[7]", attempts=0)
    row = row_of(database, "a")
    assert (other.claim_no, row.func_name, row.args, row.replacement) == (3, "other", "[7]", None)


def test_delivered_run_keeps_what_people_read(database: Database) -> None:
    """Texts are cut to size, secrets hidden, what sending again needed is dropped, and nobody holds it."""
    long, short = held(database, "a", args='["secret", 1]'), held(database, "b")
    ended(database, long, keeps_owner=True, result='"' + "x" * 100 + '"', traceback="t" * 100, failure="{}")
    ended(database, short, keeps_owner=True, result="1")

    ends = [
        Delivered(run_id="b", claim=short.claim_no, keep=20),
        Delivered(run_id="a", claim=long.claim_no, keep=20, hidden_args='["***", 1]'),
    ]
    with database.transaction() as tx:
        holding.mark_delivered(tx, ends)

    row = row_of(database, "a")
    assert (row.delivered, row.owner, row.envelope, row.failure) == (True, None, None, None)
    assert (row.args, row.kwargs, row.result, row.traceback) == ('["***", 1]', "{}", '"' + "x" * 19, "t" * 20)
    assert (row_of(database, "b").result, row_of(database, "b").delivered) == ("1", True)


def test_stamp_answers_which_runs_are_still_ours(database: Database) -> None:
    """The answer names the claim, so that an owner knows a run that it lost and got again."""
    held(database, "a"), held(database, "b"), held(database, "c", owner="host/two")

    with database.transaction() as tx:
        ours = holding.stamp(tx, "host/one", ["b", "a", "c", "gone"], later(3))

    assert ours == {"a": 1, "b": 1}
    assert row_of(database, "a").heartbeat_at == later(3)
    assert row_of(database, "c").heartbeat_at == NOW


def test_stamp_of_nothing_is_nothing(database: Database) -> None:
    """An owner that holds nothing may stamp."""
    with database.transaction() as tx:
        assert holding.stamp(tx, "host/one", [], NOW) == {}


def test_owner_sees_the_cancel_requests_of_its_running_runs(database: Database) -> None:
    """Only its own, only running ones, with the claim and the reason."""
    held(database, "a"), held(database, "b"), held(database, "c", owner="host/two")
    over = held(database, "d")
    with database.transaction() as tx:
        for run_id in ("a", "c", "d"):
            cancelling.cancel(tx, APP, run_id, later(1), f"no {run_id}")
    ended(database, over, keeps_owner=True)

    with database.reading() as connection:
        assert holding.cancel_requests(connection, APP, "host/one") == {"a": (1, "no a")}
        assert holding.cancel_requests(connection, "other", "host/one") == {}


def test_two_threads_that_claim_at_once_are_one_claim(database: Database) -> None:
    """Of many copies of a message, handled at the same moment, exactly one starts the run, known before or not."""
    for number in range(5):
        run_id, known = f"run{number}", number % 2 == 0
        if known:
            opened(database, new_run(run_id))

        found = all_at_once(
            lambda pair: claimed(database, pair[0], owner=pair[1]), [(run_id, f"o{n}") for n in range(6)]
        )

        assert sum(claim is not None for claim in found) == 1
        assert row_of(database, run_id).claim_no == 1


def _claim_in_process(url: str, owner: str, gate: Any, answers: Any) -> None:
    database = Database(url)
    with database.reading():
        pass
    gate.wait(60)
    won = [number for number in range(20) if claimed(database, f"run{number}", owner=owner) is not None]
    answers.put(won)
    database.close()


def test_two_processes_that_claim_at_once_are_one_claim(database: Database, database_url: str) -> None:
    """Each run goes to exactly one of the processes."""
    context = multiprocessing.get_context("spawn")
    gate, answers = context.Barrier(2), context.Queue()
    children = [
        context.Process(target=_claim_in_process, args=(database_url, f"host/{number}", gate, answers))
        for number in range(2)
    ]
    for child in children:
        child.start()

    won = [run for _ in children for run in answers.get(timeout=90)]

    for child in children:
        child.join(30)
    assert sorted(won) == list(range(20))


def test_ends_and_publications_at_once_do_not_wait_for_each_other(database: Database) -> None:
    """Relay, heart and owner write the same rows in the same moment; none is refused for a deadlock."""
    ids = [f"run{number:02}" for number in range(30)]
    opened(database, *(new_run(run_id) for run_id in ids))
    found = {run_id: held(database, run_id) for run_id in ids}

    def write(kind: int) -> None:
        for _ in range(5):
            if kind == 0:
                publish(database, *reversed(ids))
            elif kind == 1:
                with database.transaction() as tx:
                    holding.stamp(tx, "host/one", list(reversed(ids)), later(1))
            elif kind == 2:
                with database.transaction() as tx:
                    ends = [Delivered(run_id=item, claim=found[item].claim_no, keep=9) for item in reversed(ids)]
                    holding.mark_delivered(tx, ends)
            else:
                for run_id in ids[::3]:
                    ended(database, found[run_id], keeps_owner=True)

    all_at_once(write, range(4))

    assert owed(database) == {}
    assert {state_of(database, run_id) for run_id in ids[::3]} == {RunState.SUCCEEDED}


def test_put_aside_run_waits_or_is_skipped(database: Database) -> None:
    """Without a slot a run waits, unheld and unstarted; or it ends as skipped, with nobody left to tell."""
    waiting, skipped = held(database, "a"), held(database, "b")

    with database.transaction() as tx:
        claims.put_aside(tx, waiting, RunState.WAITING, "full", later(1))
        claims.put_aside(tx, skipped, RunState.SKIPPED, "full", later(1))

    row = row_of(database, "a")
    assert (row.state, row.reason, row.owner, row.started_at, row.ended_at) == ("waiting", "full", None, None, None)
    row = row_of(database, "b")
    assert (row.state, row.delivered, row.ended_at, row.attempts) == ("skipped", True, later(1), 0)


def test_offer_and_end_are_values() -> None:
    """They cannot be changed between their making and their writing."""
    with pytest.raises(AttributeError):
        offer("a").attempts = 1  # type: ignore[misc]
    with pytest.raises(AttributeError):
        End(state=RunState.FAILED).state = RunState.SUCCEEDED  # type: ignore[misc]
    assert LEASE.total_seconds() == 12
