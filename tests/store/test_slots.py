"""Slots: never more than max_instances, handed over in line."""

from typing import Any

import pytest

from llmtasks.states import RunState
from llmtasks.store import cancelling, claims, rescue, slots
from llmtasks.store.database import Database
from tests.store.rows_of import (
    APP,
    NOW,
    all_at_once,
    ended,
    held,
    later,
    new_run,
    offer,
    opened,
    owed,
    row_of,
    started,
    state_of,
    taken_slots,
)

FUNCTION = f"function:{APP}:sync_emails"


def starts(database: Database, run_id: str, **changes: Any) -> claims.Claim:
    """Start a run that must have a slot free."""
    claim, full = started(database, run_id, **changes)
    assert full is None
    return claim


def waits(database: Database, run_id: str, **changes: Any) -> str:
    """Claim a run that must find no slot; returns the reason."""
    _, full = started(database, run_id, **changes)
    assert full is not None
    assert state_of(database, run_id) is RunState.WAITING
    return full


def test_function_without_a_limit_takes_no_slot(database: Database) -> None:
    """Nothing is written and nothing is read for a run that nothing limits."""
    claim = starts(database, "a")

    assert taken_slots(database) == {}
    assert ended(database, claim) == (True, [])


def test_run_beyond_the_limit_waits_and_says_why(database: Database) -> None:
    """The reason names the function and the number of its slots."""
    starts(database, "a", function_slots=2)
    starts(database, "b", function_slots=2)

    reason = waits(database, "c", function_slots=2)

    assert reason == "all 2 slots of function 'sync_emails' were taken"
    assert row_of(database, "c").reason == reason
    assert taken_slots(database) == {(FUNCTION, 0): "a", (FUNCTION, 1): "b"}


def test_waiting_run_gets_the_slot_when_it_is_free(database: Database) -> None:
    """The end of an attempt hands its place to the run that waits, which is pending with a message owed."""
    claim = starts(database, "a", function_slots=1)
    assert waits(database, "b", function_slots=1) == "the only slot of function 'sync_emails' was taken"

    assert ended(database, claim, at=later(5)) == (True, ["b"])

    assert taken_slots(database) == {(FUNCTION, 0): "b"}
    assert (state_of(database, "b"), row_of(database, "b").reason) == (RunState.PENDING, None)
    assert owed(database) == {"b": "run"}
    waits(database, "c", function_slots=1)
    starts(database, "b", function_slots=1)
    assert taken_slots(database) == {(FUNCTION, 0): "b"}


def test_hand_over_goes_by_priority_then_age(database: Database) -> None:
    """The most urgent first; among equals the oldest."""
    claim = starts(database, "first", function_slots=1)
    for age, (run_id, priority) in enumerate([("late-low", 9), ("old", 5), ("young", 5), ("urgent", 1)]):
        waits(database, run_id, function_slots=1, priority=priority, at=later(age))

    order = []
    for step in range(4):
        _, handed = ended(database, claim, at=later(10 + step))
        order += handed
        claim = starts(database, handed[0], function_slots=1)

    assert order == ["urgent", "old", "young", "late-low"]
    assert ended(database, claim) == (True, [])
    assert taken_slots(database) == {}


def test_retry_gives_its_slot_back(database: Database) -> None:
    """Between two attempts a run holds no place."""
    claim = starts(database, "a", function_slots=1)
    waits(database, "b", function_slots=1)

    _, handed = ended(database, claim, RunState.RETRYING, next_attempt_at=later(60))

    assert handed == ["b"]


def test_both_limits_hold_together(database: Database) -> None:
    """A run needs a place of its function and one of its schedule; it takes both or none."""
    opened(database, *(new_run(f"s{n}", schedule_id="sid", schedule_slots=1, name="nightly") for n in range(2)))
    first = starts(database, "s0", function_slots=2)

    assert waits(database, "s1", function_slots=2) == "the only slot of schedule 'nightly' was taken"

    assert taken_slots(database) == {(FUNCTION, 0): "s0", ("schedule:sid", 0): "s0"}
    starts(database, "other", function_slots=2)
    waits(database, "third", function_slots=2)
    _, handed = ended(database, first)
    assert sorted(handed) == ["s1"]  # older than "third"; with the function's place it takes the schedule's
    assert taken_slots(database) == {(FUNCTION, 0): "s1", (FUNCTION, 1): "other", ("schedule:sid", 0): "s1"}


def test_run_that_lacks_another_slot_is_passed_over(database: Database) -> None:
    """Whoever is first in line but limited elsewhere does not keep a place from the next."""
    opened(database, *(new_run(f"s{n}", schedule_id="sid", schedule_slots=1, priority=1) for n in range(2)))
    starts(database, "s0", function_slots=3)
    other = starts(database, "other", function_slots=3)
    starts(database, "another", function_slots=3)
    waits(database, "s1", function_slots=3, priority=1)
    waits(database, "next", function_slots=3)

    assert ended(database, other) == (True, ["next"])


def test_limits_of_apps_functions_and_schedules_are_their_own(database: Database) -> None:
    """Equal names in another app, and other functions, do not share places."""
    starts(database, "a", function_slots=1)
    starts(database, "b", function_slots=1, func_name="report")
    with database.transaction() as tx:
        claim = claims.claim(tx, offer("c", app="other", function_slots=1), NOW, NOW)
        assert claim is not None
        assert claims.take_slots(tx, "other", "sync_emails", claim, NOW) is None

    assert len(taken_slots(database)) == 3


def test_threads_at_once_never_exceed_the_limit(database: Database) -> None:
    """Of many runs that start at the same moment exactly k do; the others wait."""
    found = all_at_once(lambda n: started(database, f"run{n}", function_slots=3)[1], range(8))

    assert found.count(None) == 3
    assert len(taken_slots(database)) == 3


def test_ends_and_starts_at_once_never_exceed_the_limit(database: Database) -> None:
    """Whatever is started, ended and handed over at the same moment, a place has one run, and no run is forgotten."""
    limit, total = 2, 24
    opened(database, *(new_run(f"run{n:02}") for n in range(total)))

    def work(worker: int) -> int:
        peak = 0
        for number in range(worker, total, 4):
            claim, full = started(database, f"run{number:02}", function_slots=limit, owner=f"host/{worker}")
            peak = max(peak, len(taken_slots(database)))
            if full is None:
                ended(database, claim, delivered=True)
        return peak

    assert max(all_at_once(work, range(4))) <= limit
    for _ in range(total + 1):
        with database.transaction() as tx:
            rescue.promote(tx, APP, NOW)
        handed = [run_id for run_id in taken_slots(database).values() if state_of(database, run_id) == "pending"]
        for run_id in handed:
            ended(database, starts(database, run_id, function_slots=limit), delivered=True)
        if not handed:
            break
    assert {state_of(database, f"run{n:02}") for n in range(total)} == {RunState.SUCCEEDED}
    assert taken_slots(database) == {}


def test_keeper_hands_over_what_nobody_did(database: Database) -> None:
    """A run that began to wait while the last place was given back is found by the next promotion."""
    claim = starts(database, "a", function_slots=2)
    starts(database, "b", function_slots=2)
    for number in range(3):
        waits(database, f"w{number}", function_slots=2, at=later(number))
    with database.transaction() as tx:  # an end whose hand-over saw nobody wait
        tx.execute(slots.slots.delete().where(slots.slots.c.run_id == claim.id))

    with database.transaction() as tx:
        assert slots.waiting_scopes(tx, APP) == [FUNCTION]
        assert rescue.promote(tx, APP, NOW) == ["w0"]
        assert rescue.promote(tx, APP, NOW) == []
        assert rescue.promote(tx, "other", NOW) == []


def test_several_freed_places_go_to_as_many_runs(database: Database) -> None:
    """A rescue of many runs leaves no place unused until the next round."""
    for number in range(3):
        starts(database, f"lost{number}", function_slots=3)
    for number in range(4):
        waits(database, f"w{number}", function_slots=3, at=later(number))

    with database.transaction() as tx:
        moved = rescue.lose_silent(tx, APP, later(13), later(13), "{}")

    assert sorted(moved) == ["lost0", "lost1", "lost2", "w0", "w1", "w2"]
    assert sorted(taken_slots(database).values()) == ["w0", "w1", "w2"]


def test_cancelled_run_gives_back_the_slot_that_it_was_handed(database: Database) -> None:
    """A run that was handed a place and is cancelled before it starts passes it on."""
    claim = starts(database, "a", function_slots=1)
    waits(database, "b", function_slots=1)
    waits(database, "c", function_slots=1, at=later(1))
    ended(database, claim)

    with database.transaction() as tx:
        cancelling.cancel(tx, APP, "b", later(2), "cancelled")

    assert taken_slots(database) == {(FUNCTION, 0): "c"}
    assert state_of(database, "c") is RunState.PENDING


def test_released_run_gives_its_slot_back(database: Database) -> None:
    """A worker that shuts down puts its run back, and its place is free at once."""
    starts(database, "a", function_slots=1)
    waits(database, "b", function_slots=1)

    with database.transaction() as tx:
        assert rescue.release(tx, "host/one", "a", later(1)) == (True, ["b"])


@pytest.mark.parametrize("limit", [1, 4])
def test_lowered_limit_takes_effect_as_places_are_given_back(database: Database, limit: int) -> None:
    """A new limit counts places from 0; runs that hold a higher place keep it until they end."""
    for number in range(4):
        starts(database, f"run{number}", function_slots=4)

    assert started(database, "next", function_slots=limit)[1] is not None


def test_claim_without_slots_keeps_a_run_that_ended_out(database: Database) -> None:
    """An end that is only told takes no slot."""
    ended(database, starts(database, "a", function_slots=1), keeps_owner=False)

    replay = held(database, "a", function_slots=1, at=later(1))

    assert replay.state is RunState.SUCCEEDED
    assert taken_slots(database) == {}


def test_lower_limit_counts_the_places_that_runs_hold_beyond_it(database: Database) -> None:
    """Whoever holds a high place from before goes on, and no other run starts in its stead."""
    first, second, third = (starts(database, run_id, function_slots=3) for run_id in ("a", "b", "c"))
    ended(database, first)

    waits(database, "d", function_slots=2)
    assert taken_slots(database) == {(FUNCTION, 1): "b", (FUNCTION, 2): "c"}

    assert ended(database, third) == (True, ["d"])
    waits(database, "e", function_slots=2)
    assert ended(database, second) == (True, ["e"])
    assert taken_slots(database) == {(FUNCTION, 0): "d", (FUNCTION, 1): "e"}


def test_run_keeps_its_place_beyond_a_lower_limit(database: Database) -> None:
    """A run that was handed a high place before the limit was lowered starts with it."""
    claim = [starts(database, run_id, function_slots=2) for run_id in ("a", "b")][1]
    waits(database, "c", function_slots=2)
    ended(database, claim)

    starts(database, "c", function_slots=1)

    assert taken_slots(database) == {(FUNCTION, 0): "a", (FUNCTION, 1): "c"}


def test_slot_handed_before_the_limit_was_removed_is_given_back(database: Database) -> None:
    """Code without the limit starts the run; the place goes to those that still wait for one."""
    claim = starts(database, "a", function_slots=1)
    waits(database, "b", function_slots=1)
    ended(database, claim)
    assert taken_slots(database) == {(FUNCTION, 0): "b"}

    free = starts(database, "b", function_slots=None)

    assert taken_slots(database) == {}
    assert ended(database, free) == (True, [])
