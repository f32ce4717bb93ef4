"""Groups of claims and ends say what the same statements one by one would say."""

from typing import Any

from llmtasks.states import RunState
from llmtasks.store import claims, ends, groups
from llmtasks.store.claims import Claim, Offer
from llmtasks.store.database import Database
from llmtasks.store.ends import End
from tests.store.rows_of import (
    LEASE,
    NOW,
    all_at_once,
    everything,
    held,
    later,
    new_run,
    offer,
    opened,
    set_run,
    started,
    state_of,
)


def claimed(database: Database, *offers: Offer) -> list[Claim | None]:
    with database.transaction() as tx:
        return groups.claim_slotless(tx, offers, NOW, NOW - LEASE)


def test_group_of_claims_writes_what_lone_ones_write(database: Database) -> None:
    """New runs and opened ones, in any order: claims and rows are those of statements one by one."""
    changes: dict[str, Any] = {"created_at": later(-3), "queue": None, "max_retries": None, "args": '["\\u00e9\\"{},"]'}
    opened(database, new_run("known", max_retries=1), new_run("known alone", max_retries=1))

    new, known = claimed(database, offer("new", **changes), offer("known", **changes))
    with database.lone() as lone:
        one_by_one = [
            claims.claim_slotless(lone, offer(run_id, **changes), NOW, NOW - LEASE)
            for run_id in ("new alone", "known alone")
        ]

    assert everything(database, "new") == everything(database, "new alone")
    assert everything(database, "known") == everything(database, "known alone")
    for got, expected in zip((new, known), one_by_one, strict=True):
        assert got is not None
        assert expected is not None
        assert got._replace(id=expected.id) == expected


def test_group_takes_what_it_may_and_leaves_the_rest(database: Database) -> None:
    """Held elsewhere, limited, ended: each such run is left as it is, and the others of the group are taken."""
    held(database, "held", owner="host/two")
    opened(database, new_run("limited"), new_run("scheduled", schedule_id="s", scheduled_for=NOW, schedule_slots=1))
    opened(database, new_run("over"))
    set_run(database, "over", state=RunState.SUCCEEDED, delivered=True)
    before = {run_id: everything(database, run_id) for run_id in ("held", "limited", "scheduled", "over")}

    found = claimed(
        database,
        offer("held"),
        offer("z free"),
        offer("limited", function_slots=1),
        offer("scheduled"),
        offer("over"),
        offer("a free"),
    )

    assert [claim.id if claim else None for claim in found] == [None, "z free", None, None, None, "a free"]
    assert {run_id: everything(database, run_id) for run_id in before} == before


def test_undelivered_end_is_taken_in_a_group(database: Database) -> None:
    """A run that ended, of which nobody was told, comes with its outcome."""
    opened(database, new_run("told"))
    set_run(database, "told", state=RunState.FAILED, failure='{"exc_type": "E"}')

    (claim,) = claimed(database, offer("told"))

    assert claim is not None
    assert (claim.state, claim.failure, claim.claim_no) == (RunState.FAILED, '{"exc_type": "E"}', 1)


def test_group_of_ends_writes_what_lone_ones_write(database: Database) -> None:
    """Results, failures and retries with every field, and with none: the rows are those of statements one by one."""
    how = [
        End(state=RunState.SUCCEEDED, keeps_owner=True, result='"\\u00e9"', run_seconds=0.5, peak_memory=2**40),
        End(state=RunState.RETRYING, error="boom", traceback="a\0b", next_attempt_at=later(5), args="[2]"),
        End(state=RunState.QUEUED, counts=False),
        End(state=RunState.SKIPPED, delivered=True, reason="no", cpu_seconds=1.25, kwargs="{}"),
    ]
    grouped = [held(database, f"grouped {number}") for number in range(len(how))]
    alone = [held(database, f"alone {number}") for number in range(len(how))]
    for kind in ("grouped", "alone"):
        set_run(database, f"{kind} 1", cancel_requested_at=NOW, reason="stop")

    with database.transaction() as tx:
        assert groups.end(tx, list(zip(grouped, how, strict=True)), later(9)) == [True] * len(how)
    with database.lone() as lone:
        assert all(ends.end_lone(lone, claim, end, later(9)) for claim, end in zip(alone, how, strict=True))

    for number in range(len(how)):
        assert everything(database, f"grouped {number}") == everything(database, f"alone {number}")


def test_late_owner_in_a_group_ends_nothing(database: Database) -> None:
    """One that lost its run is told so; the others of its group end theirs."""
    late = held(database, "late")
    set_run(database, "late", state=RunState.QUEUED, owner=None)
    again = held(database, "late")
    other = held(database, "other")
    success = End(state=RunState.SUCCEEDED)

    with database.transaction() as tx:
        assert groups.end(tx, [(late, success), (other, success)], NOW) == [False, True]

    assert state_of(database, "late") is RunState.RUNNING
    assert again.claim_no == 2


def test_groups_that_want_the_same_runs_share_them(database: Database) -> None:
    """Copies of messages in several groups at the same moment, in different orders: each run starts once."""
    ids = [f"run {number}" for number in range(20)]
    opened(database, *(new_run(run_id) for run_id in ids[::2]))

    def take(owner: int) -> list[str]:
        wanted = ids if owner % 2 else ids[::-1]
        found = claimed(database, *(offer(run_id, owner=f"host/{owner}") for run_id in wanted))
        return [claim.id for claim in found if claim is not None]

    taken = [run_id for found in all_at_once(take, range(6)) for run_id in found]

    assert sorted(taken) == sorted(ids)


def test_group_beside_a_held_slot(database: Database) -> None:
    """Slots that other runs hold do not matter to runs without a limit."""
    started(database, "limited", function_slots=1)
    opened(database, new_run("free"))

    assert claimed(database, offer("free"))[0] is not None
