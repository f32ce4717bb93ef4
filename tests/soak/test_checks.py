"""The soak's checks see what they are there for: each of these is one thing that must never be."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.soak.checks import Call, Found, broken, calls_of
from tests.soak.load import Asked
from tests.soak.plan import plan

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def run(run_id: str, **changes: Any) -> Any:
    """A row of a run that succeeded at its first attempt."""
    values: dict[str, Any] = {
        "id": run_id, "name": "quick", "state": "succeeded", "delivered": True, "owner": None, "attempts": 1,
        "losses": 0, "result": "1", "schedule_id": None, "scheduled_for": None, "stands_for": 1,
    }  # fmt: skip
    return SimpleNamespace(**values | changes)


def found(*runs: Any, calls: list[Call] | None = None, **changes: Any) -> Found:
    """What a soak finds: these runs, each called once."""
    once = [Call(item.id, 1, 1, item.name, 10.0, 11.0) for item in runs]
    nothing: dict[str, Any] = {"outbox": [], "slots": [], "messages": {}, "asked": Asked(), "put_backs_at": []}
    return Found(runs={item.id: item for item in runs}, calls=once if calls is None else calls, **nothing | changes)


def second(number: int, **changes: Any) -> Any:
    return run(f"tick-{number}", name="every_second", scheduled_for=NOON + timedelta(seconds=number), **changes)


def test_nothing_is_broken_where_all_is_well() -> None:
    """Also with a run that was put back, one that was lost before its call, and one that stands for three instants."""
    calls = [
        Call("back", 1, 1, "quick", 1.0, 2.0),
        Call("back", 2, 1, "quick", 4.0, 5.0),
        Call("lost", 2, 2, "quick", 1.0, 2.0),
    ]
    runs = [run("back"), run("lost", attempts=2, losses=1), second(1), second(2), second(5, stands_for=3)]

    assert broken(found(*runs, calls=calls, put_backs_at=[3.0])) == []


BROKEN = {
    "not in the ledger": found(asked=Asked(runs={"a"})),
    "one-offs without exactly one run": found(asked=Asked(one_offs={"a"})),
    "a run is failed": found(run("a", state="failed")),
    "a run is cancelled": found(run("a", state="cancelled")),
    "Celery was not told": found(run("a", delivered=False)),
    "instants between two rows are in none": found(second(1), second(3)),
    "or in two": found(second(1), second(2, stands_for=2)),
    "2 calls of 'single' at once": found(run("a", name="single"), run("b", name="single")),
    "called its function 2 times": found(run("a"), calls=[Call("a", 1, 1, "quick", 1.0, 2.0)] * 2),
    "nobody put it back": found(
        run("a"), calls=[Call("a", 1, 1, "quick", 1.0, 2.0), Call("a", 2, 1, "quick", 4.0, 5.0)]
    ),
    "an earlier attempt was called after": found(
        run("a", attempts=2), calls=[Call("a", 1, 2, "quick", 1.0, 2.0), Call("a", 2, 1, "quick", 4.0, 5.0)]
    ),
    "1 attempts were called, 2 recorded, 0 lost": found(run("a", attempts=2)),
    "a call of a run that is not": found(calls=[Call("a", 1, 1, "quick", 1.0, 2.0)]),
    "a result is 1, not 2": found(run("a"), asked=Asked(results={"a": 2})),
    "the body of a chord was called 2 times": found(
        run("a", attempts=2),
        calls=[Call("a", 1, 1, "quick", 1.0, 2.0), Call("a", 2, 2, "quick", 4.0, 5.0)],
        asked=Asked(bodies={"a"}),
    ),
    "slots are taken": found(slots=["a"]),
    "messages are in the outbox": found(outbox=["a"]),
    "has an owner": found(run("a", owner="host/one")),
    "messages are in Redis": found(messages={"celery": 1}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_must_not_be_is_seen(what: str) -> None:
    """One thing is wrong, and that is what the check says."""
    assert [item.what for item in broken(BROKEN[what]) if what in item.what]


def test_killed_call_ends_with_its_process(tmp_path: Path) -> None:
    """Where nobody knows when the process died, its call takes no time: only what is certain counts as too many."""
    line = {"run": "a", "claim": 1, "attempt": 1, "func": "single", "event": "begin", "at": 5.0, "pid": 7}
    other = line | {"run": "b", "pid": 8}
    trace = tmp_path / "calls"
    trace.write_text("".join(f"{json.dumps(item)}\n" for item in (line, other)))

    calls = calls_of(trace, {7: 9.0})

    assert [(call.begin, call.end) for call in calls] == [(5.0, 9.0), (5.0, 5.0)]


def test_seed_repeats_acts_and_load() -> None:
    """The same seed gives the same steps, another gives others, and SQLite has no server that could be killed."""
    first = plan(7, 60, postgresql=True)

    assert first == plan(7, 60, postgresql=True)
    assert first != plan(8, 60, postgresql=True)
    assert not any("postgresql" in step.what for step in plan(7, 600, postgresql=False)[0])
