"""What must hold when the faults have stopped and everything has settled; each check names what does not."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmtasks.states import RunState
from tests.soak.load import Asked
from tests.soak.tasks import LIMITS

#: How far the grid of each periodic schedule goes on.
EVERY = {
    "every_second": timedelta(seconds=1),
    "every_half_second": timedelta(seconds=0.5),
    "every_minute": timedelta(minutes=1),
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a task function, from its begin to its end or its process's."""

    run: str
    claim: int
    attempt: int
    func: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Everything that there is afterwards. ``runs`` are whole rows by their ids, ``outbox`` and ``slots`` run ids."""

    runs: dict[str, Any]
    outbox: list[str]
    slots: list[str]
    #: Redis keys that hold a message, and how many.
    messages: dict[str, int]
    calls: list[Call]
    asked: Asked
    #: See ``Stage``.
    put_backs_at: list[float]


@dataclass(frozen=True, slots=True)
class Broken:
    """An invariant that does not hold, in words, and the runs to look at."""

    what: str
    runs: tuple[str, ...] = ()


def calls_of(trace: Path, deaths: dict[int, float]) -> list[Call]:
    """The calls in a trace. One without an end ended when its process did, where that was killed; else at once."""
    begun: dict[tuple[str, int], dict[str, Any]] = {}
    calls: list[Call] = []
    lines = [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []
    ends = {(line["run"], line["claim"], line["pid"]): line["at"] for line in lines if line["event"] == "end"}
    for line in lines:
        if line["event"] == "begin":
            begun[line["run"], line["claim"]] = line
            end = ends.get((line["run"], line["claim"], line["pid"]), deaths.get(line["pid"], 0.0))
            span = (line["at"], max(line["at"], end))
            calls.append(Call(line["run"], line["claim"], line["attempt"], line["func"], *span))
    return calls


def broken(found: Found) -> list[Broken]:
    """All that does not hold."""
    checks = (
        _accepted_runs_end, _instants_have_one_run, _limits_hold, _no_claim_calls_twice, _calls_are_accounted_for,
        _results_are_right, _nothing_is_left,
    )  # fmt: skip
    return [item for check in checks for item in check(found)]


def _accepted_runs_end(found: Found) -> Iterator[Broken]:
    """What was accepted is in the ledger, has ended as it should, and Celery was told."""
    if missing := found.asked.runs - set(found.runs):
        yield Broken(f"{len(missing)} accepted runs are not in the ledger", tuple(missing))
    one_offs = Counter(run.schedule_id for run in found.runs.values() if run.schedule_id in found.asked.one_offs)
    if odd := [schedule for schedule in found.asked.one_offs if one_offs[schedule] != 1]:
        yield Broken(f"one-offs without exactly one run: {odd}")
    for run in found.runs.values():
        expected = {RunState.SUCCEEDED} | ({RunState.CANCELLED} if run.id in found.asked.cancelled else set())
        if run.state not in expected:
            yield Broken(f"a run is {run.state}, not {' or '.join(sorted(expected))}", (run.id,))
        elif not run.delivered:
            yield Broken("Celery was not told an end", (run.id,))


def _instants_have_one_run(found: Found) -> Iterator[Broken]:
    """From a schedule's first instant to its last each is in exactly one row, by itself or by ``stands_for``."""
    for name, every in EVERY.items():
        rows = sorted((run for run in found.runs.values() if run.name == name), key=lambda run: run.scheduled_for)
        for before, after in pairwise(rows):
            if after.scheduled_for - before.scheduled_for != every * after.stands_for:
                yield Broken(f"{name}: instants between two rows are in none, or in two", (before.id, after.id))


def _limits_hold(found: Found) -> Iterator[Broken]:
    """No more calls of a function overlap than it has slots."""
    for name, limit in LIMITS.items():
        events = [(call.begin, 1, call.run) for call in found.calls if call.func == name]
        events += [(call.end, -1, call.run) for call in found.calls if call.func == name]
        running: set[str] = set()
        for _, change, run in sorted(events):  # at the same instant ends come first
            running = running | {run} if change > 0 else running - {run}
            if len(running) > limit:
                yield Broken(f"{len(running)} calls of {name!r} at once, {limit} allowed", tuple(running))


def _no_claim_calls_twice(found: Found) -> Iterator[Broken]:
    """A claim calls its function once."""
    for (run, claim), count in Counter((call.run, call.claim) for call in found.calls).items():
        if count > 1:
            yield Broken(f"claim {claim} called its function {count} times", (run,))


def _calls_are_accounted_for(found: Found) -> Iterator[Broken]:
    """Calls = attempts recorded - attempts lost before their call + put-backs.

    A put-back is a call whose attempt is called again under the same number: it was not counted. There is none unless
    somebody was told to put back, or lost its broker, after that call began. The other calls have a number each, and
    the ledger recorded as many attempts; more only where a worker died between its claim and the call.
    """
    by_run: dict[str, list[Call]] = defaultdict(list)
    for call in found.calls:
        by_run[call.run].append(call)
    for run_id, calls in by_run.items():
        run = found.runs.get(run_id)
        if run is None:
            yield Broken("a call of a run that is not in the ledger", (run_id,))
            continue
        calls.sort(key=lambda call: call.claim)
        for before, after in pairwise(calls):
            told = any(before.begin - 1 <= at <= after.begin for at in found.put_backs_at)
            if after.attempt == before.attempt and not told:
                yield Broken(f"attempt {after.attempt} was called twice and nobody put it back", (run_id,))
            if after.attempt < before.attempt:
                yield Broken("an earlier attempt was called after a later one", (run_id,))
        numbers = len({call.attempt for call in calls})
        # Cancelled between its put-back and its next call, the last attempt was not counted.
        uncounted = int(run.state == RunState.CANCELLED)
        if not numbers - uncounted <= run.attempts <= numbers + run.losses:
            yield Broken(f"{numbers} attempts were called, {run.attempts} recorded, {run.losses} lost", (run_id,))


def _results_are_right(found: Found) -> Iterator[Broken]:
    """Chords and chains give what they should; a chord's body is called once, but for kills in the middle of it."""
    calls = Counter(call.run for call in found.calls)
    for run_id, value in found.asked.results.items():
        run = found.runs.get(run_id)
        if run is not None and run.result != str(value):
            yield Broken(f"a result is {run.result}, not {value}", (run_id,))
    for run_id in found.asked.bodies & set(found.runs):
        run = found.runs[run_id]
        put_backs = calls[run_id] - len({call.attempt for call in found.calls if call.run == run_id})
        if calls[run_id] > 1 + run.losses + put_backs:
            yield Broken(f"the body of a chord was called {calls[run_id]} times", (run_id,))


def _nothing_is_left(found: Found) -> Iterator[Broken]:
    """No slot is taken, nothing is owed to the broker, no message is fetched or queued."""
    if found.slots:
        yield Broken("slots are taken", tuple(found.slots))
    if found.outbox:
        yield Broken("messages are in the outbox", tuple(found.outbox))
    for run in found.runs.values():
        if run.owner is not None:
            yield Broken("an ended run has an owner", (run.id,))
    if found.messages:
        yield Broken(f"messages are in Redis: {found.messages}")
