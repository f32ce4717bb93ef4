"""Unfinished runs of schedules: what counts, what a new run cancels, and which index answers."""

from typing import Any

import pytest
from sqlalchemy import insert

from llmtasks.states import ENDED, LIVE, RunState
from llmtasks.store import outbox, overlaps, rows, runs, uncovered
from llmtasks.store.database import Database
from llmtasks.store.overlaps import Unfinished
from tests.store.plans import analyze, plan_of
from tests.store.rows_of import (
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
    started,
    state_of,
    taken_slots,
)  # fmt: skip


def of(schedule: str, run_id: str, minute: int | None = 0, **values: Any) -> runs.NewRun:
    instant = None if minute is None else later(60 * minute)
    return new_run(run_id, schedule_id=schedule, scheduled_for=instant, **values)


def found(database: Database, *schedules: str) -> dict[str, Unfinished]:
    with database.transaction() as tx:
        return overlaps.unfinished(tx, schedules)


@pytest.mark.parametrize("state", sorted(RunState))
def test_what_has_not_ended_is_unfinished(database: Database, state: RunState) -> None:
    """Pending, queued, waiting, running and retrying runs, and no others, whether their end was told or not."""
    opened(database, of("s", "a"))
    set_run(database, "a", state=state)

    assert len(found(database, "s")) == (state in LIVE) == (state not in ENDED)


def test_one_question_answers_for_many_schedules(database: Database) -> None:
    """How many each has, and its oldest; runs by hand count, backfilled ones and those of others do not."""
    opened(database, of("one", "a", 0), of("two", "d", None), of("three", "e", 0), at=later(-9))
    opened(database, of("one", "b", 1), of("one", "c", 2, backfilled=True), of("four", "f", backfilled=True), at=NOW)
    set_run(database, "a", state=RunState.RUNNING)

    assert found(database, "one", "two", "four", "five") == {
        "one": Unfinished(count=2, run_id="a", state=RunState.RUNNING, scheduled_for=NOW),
        "two": Unfinished(count=1, run_id="d", state=RunState.PENDING, scheduled_for=None),
    }
    assert found(database) == {}


def test_unfinished_runs_are_found_by_their_index(database: Database) -> None:
    """However long the ledger: what is read there are rows between their opening and the delivery of their end."""
    opened(database, of("one", "a", 0))
    row = row_of(database, "a")._asdict()
    over = {"state": RunState.SUCCEEDED, "delivered": True}
    with database.transaction() as tx:
        many = [row | over | {"id": f"r{n}", "scheduled_for": later(-60 * n - 60)} for n in range(2_000)]
        tx.execute(insert(rows.runs), many)
    analyze(database, "llmtasks_runs")

    with database.transaction() as tx:
        asked = overlaps._OLDEST[tx.dialect.name].params(ids=["one", "two"])
        statement = str(asked.compile(dialect=tx.dialect, compile_kwargs={"literal_binds": True}))
        plan = plan_of(tx, statement, None)

    assert plan.indexes == {"ix_llmtasks_runs_unfinished"}, plan
    assert "llmtasks_runs" not in plan.scanned, plan


def test_unstarted_runs_are_cancelled_at_once_and_running_ones_asked(database: Database) -> None:
    """Each for the reason of its own schedule; messages are taken back, backfilled runs are left alone."""
    opened(database, *(of("one", run_id, minute, schedule_slots=1) for minute, run_id in enumerate("abc")))
    opened(database, of("one", "old", 9, backfilled=True), of("two", "d"), of("three", "e"))
    started(database, "a")
    started(database, "b")
    with database.transaction() as tx:
        cancelled = overlaps.cancel_unfinished(tx, {"one": "for x", "two": "for y"}, later(1))
        assert overlaps.cancel_unfinished(tx, {}, later(1)) == []

    assert cancelled == ["a", "b", "c", "d"]
    assert [row_of(database, run_id).reason for run_id in "abcd"] == ["for x", "for x", "for x", "for y"]
    assert [state_of(database, run_id) for run_id in "abcd"] == ["running", "cancelled", "cancelled", "cancelled"]
    assert row_of(database, "a").cancel_requested_at == later(1)
    assert taken_slots(database) == {("schedule:one", 0): "a"}
    assert owed(database) == {"old": "run", "e": "run", "a": "run"}


def test_postponed_messages_keep_their_own_times(database: Database) -> None:
    """Nobody sends them before; what may be sent at once is the caller's for a while."""
    first, second = of("one", "a", available_at=later(20)), of("two", "b", available_at=later(40))
    with database.transaction() as tx:
        messages = runs.open_many(tx, [first, second, of("three", "c")], NOW, later(3))
        # Tried once more by a tick whose first answer was lost.
        again = runs.open_many(tx, [of("one", "a", available_at=later(30))], later(1), later(4))

    assert ([item.run_id for item in messages], again) == (["c"], [])
    with database.transaction() as tx:
        assert outbox.take_due(tx, "shop", later(2.9), later(3), 10) == []
        assert [item.run_id for item in outbox.take_due(tx, "shop", later(3), later(3), 10)] == ["c"]
        assert [item.run_id for item in outbox.take_due(tx, "shop", later(20), later(23), 10)] == ["c", "a"]
        assert "b" in [item.run_id for item in outbox.take_due(tx, "shop", later(40), later(43), 10)]


def test_waiting_backfilled_runs_go_in_the_order_of_their_instants(database: Database) -> None:
    """They were all opened at the same moment; the schedule's own, which came later, passes them."""
    ids = ["d", "b", "a", "c"]
    backfilled = {"schedule_slots": 1, "backfilled": True}
    opened(database, *(of("s", run_id, minute, **backfilled) for minute, run_id in enumerate(ids)))
    opened(database, of("s", "own", 60, schedule_slots=1), at=later(9))
    claims = {run_id: started(database, run_id)[0] for run_id in [*ids, "own"]}

    order = []
    claim = claims["d"]
    for _ in range(4):
        _, (following,) = ended(database, claim)
        order.append(following)
        claim = held(database, following)

    assert order == ["own", *ids[1:]]


def test_uncovered_are_instants_without_a_row_and_those_that_a_policy_left_out(database: Database) -> None:
    """Skipped at dispatch or at the claim; not what expired, was handed over, or ran and raised Ignore."""
    opened(database, *(of("s", run_id, minute) for minute, run_id in enumerate(["ran", "expired", "ignored", "full"])))
    with database.transaction() as tx:
        runs.record_skipped(tx, [of("s", "overlapped", 4, reason="overlap"), of("s", "ran", 0)], NOW)
    publish(database, "expired", "ignored", "full")
    set_run(database, "expired", state="skipped", reason="expired")
    ended(database, held(database, "ignored"), RunState.SKIPPED)
    set_run(database, "full", state="skipped", reason="no place", claim_no=1)

    with database.transaction() as tx:
        assert uncovered.covered(tx, "s", NOW, later(240)) == {later(60 * minute) for minute in range(3)}
        assert uncovered.skipped(tx, "s", later(180), later(240)) == {later(180): "no place", later(240): "overlap"}
        assert uncovered.covered(tx, "s", later(60), later(60)) == {later(60)}
        uncovered.forget(tx, [of("s", run_id) for run_id in ("ran", "expired", "ignored", "full", "overlapped")])
        uncovered.forget(tx, [])
        assert uncovered.skipped(tx, "s", NOW, later(240)) == {}
        assert len(uncovered.covered(tx, "s", NOW, later(240))) == 3
