"""``python -m benchmarks.kills``: three real beats, one after the other killed with SIGKILL, for two minutes."""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from benchmarks import stage
from benchmarks.arrivals import Arrivals
from benchmarks.beat import EVERY
from benchmarks.report import Benchmark, Figure, Report, below, percentile, run
from benchmarks.schedulers.ours import Ours
from benchmarks.schedulers.scheduler import Planned
from tests.processes import CeleryProcess
from tests.waiting import wait_until

#: Between the start of the beats and the first instant that counts.
LEAD = timedelta(seconds=6)
#: Seconds after the last kill in which everything has to come, and in which copies may.
SETTLE = 60.0
GRACE = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What became of the instants; lateness in seconds, from an instant to its first message."""

    instants: int
    lost: int
    doubled: int
    copies: int
    kills: int
    #: How many of them found no other beat that had started.
    unattended: int
    lateness: list[float]


def killed_in_turn(kind: str, beats: int, schedules: int, seconds: float, pause: float, seed: int) -> Found:
    """Let the beats fire all schedules every second, and kill one after the other for so long."""
    rng = random.Random(seed)
    with Ours(kind, careful=True) as scheduler, Arrivals(scheduler.broker) as arrivals:
        first = datetime.now(UTC).replace(microsecond=0) + LEAD
        # Spread over the second: whenever one is killed, somebody is in the middle of something.
        firsts = {f"each second {at}": first + EVERY * at / schedules for at in range(schedules)}
        scheduler.plan([Planned(name=name, every=EVERY, first=at) for name, at in firsts.items()])
        running = [scheduler.beat(number + 1) for number in range(beats)]
        time.sleep(max(0.0, (first - datetime.now(UTC)).total_seconds()))
        kills = list(kill_for(running, seconds, pause, rng))
        last = datetime.now(UTC) + EVERY
        expected = {(name, instant) for name, at in firsts.items() for instant in each_second(at, last)}

        def came() -> bool:
            firings = scheduler.firings(arrivals.since(first), EVERY)
            return expected <= {(item.name, item.instant) for item in firings}

        with contextlib.suppress(AssertionError):  # what did not come is counted as lost
            wait_until(came, SETTLE, "every instant", interval=1.0)
        time.sleep(GRACE)
        for beat in running:
            beat.kill()
        messages = arrivals.since(first)
        firings = [item for item in scheduler.firings(messages, EVERY) if (item.name, item.instant) in expected]
        instant_of = {item.id: (item.name, item.instant) for item in firings}
        late: dict[tuple[str, datetime], float] = {}
        for item in firings:
            late.setdefault((item.name, item.instant), (item.at - item.instant).total_seconds())
        starts = Counter(instant_of[item] for item in scheduler.starts(messages) if item in instant_of)
    return Found(
        instants=len(expected),
        lost=len(expected) - len(starts),
        doubled=starts.total() - len(starts),
        copies=len(firings) - len(instant_of),
        kills=len(kills),
        unattended=kills.count(False),
        lateness=list(late.values()),
    )


def kill_for(running: list[CeleryProcess], seconds: float, pause: float, rng: random.Random) -> Iterator[bool]:
    """Kill the beats in turn and start each again at once, at moments of chance; says each time if another was up."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for beat in running:
            time.sleep(pause * rng.uniform(0.5, 1.5))
            beat.kill()
            attended = any(other.ready in other.log_of_this_start() for other in running if other is not beat)
            beat.start()
            yield attended


def each_second(first: datetime, last: datetime) -> Iterator[datetime]:
    """The instants from the first to the last."""
    while first <= last:
        yield first
        first += EVERY


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--seconds", type=float, help="how long beats are killed (120)")
    parser.add_argument("--beats", type=int, default=3, help="how many there are (3)")
    parser.add_argument("--schedules", type=int, help="schedules, due in every second and spread over it (40)")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds between two kills, give or take half (3)")
    parser.add_argument("--seed", type=int, help="repeats the pauses of a run")
    parser.add_argument("--database", choices=stage.DATABASES, action="append", help="only this one")


def measure(options: argparse.Namespace) -> Report:
    """Kill beats on each database."""
    seconds = options.seconds or (6.0 if options.quick else 120.0)
    schedules = options.schedules or (5 if options.quick else 40)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    figures: list[Figure] = []
    for kind in options.database or stage.DATABASES:
        found = killed_in_turn(kind, options.beats, schedules, seconds, options.pause, seed)
        beside = (
            f"of {found.instants:,}; {found.kills} kills, {found.unattended} of them left no beat that was up; "
            f"{found.copies} copies of messages"
        )
        late = f"p50 {percentile(found.lateness, 0.5):.2f} s, p99 {percentile(found.lateness, 0.99):.2f} s"
        figures += [
            below(1, f"{kind}: lost", found.lost, "instants", beside),
            below(1, f"{kind}: started twice", found.doubled, "instants"),
            below(4, f"{kind}: longest take-over", max(found.lateness, default=0), "s", late),
        ]
    return Report(
        name="kills",
        about=(
            f"{options.beats} beats, {schedules} schedules due in every second and spread over it. For {seconds:g} s "
            "one beat after the other is killed (SIGKILL) and started again at once, every "
            f"{options.pause:g} s give or take half (seed {seed})."
        ),
        figures=figures,
        notes=[
            "A worker gets all messages in the end, and what counts is each start of the function: a copy of a message "
            "has its run's id and starts nothing.",
            "Take-over: the time from an instant to its first message, whoever died in between; the longest of all.",
        ],
    )


BENCHMARK = Benchmark(
    name="kills",
    about="two minutes of SIGKILL over three beats: what is lost, what is doubled, the longest take-over",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
