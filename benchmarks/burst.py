"""``python -m benchmarks.burst``: 20,000 schedules due in the same instant, one real ``celery beat``, then two."""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime, timedelta

from benchmarks import stage
from benchmarks.arrivals import Arrivals
from benchmarks.report import Benchmark, Figure, Report, below, run
from benchmarks.schedulers.ours import Ours
from benchmarks.schedulers.scheduler import Planned
from tests.waiting import wait_until

#: Between the writing of the schedules, which takes longer the more there are, and their instant: beat runs by then.
LEAD = timedelta(seconds=4)
#: Seconds in which all messages have to be there.
BOUND = 120.0


def measure_one(kind: str, due: int, beats: int) -> tuple[float, float]:
    """Seconds from the instant to the last message, and of CPU of all beats meanwhile."""
    with Ours(kind, careful=False) as scheduler, Arrivals(scheduler.broker) as arrivals:
        instant = datetime.now(UTC).replace(microsecond=0) + LEAD + timedelta(seconds=due / 2_500)
        daily = timedelta(days=1)
        scheduler.plan([Planned(name=f"burst {number}", every=daily, first=instant) for number in range(due)])
        running = [scheduler.beat(number + 1) for number in range(beats)]
        time.sleep(max(0.0, (instant - datetime.now(UTC)).total_seconds() - 0.2))
        used = sum(stage.cpu_seconds(beat) for beat in running)
        wait_until(lambda: len(arrivals.since(instant)) >= due, BOUND, f"{due:,} messages", interval=0.1)
        used = sum(stage.cpu_seconds(beat) for beat in running) - used
        last = max(item.at for item in arrivals.since(instant))
        assert len({item.id for item in arrivals.since(instant)}) == due
        for beat in running:
            beat.terminate()
    return (last - instant).total_seconds(), used


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--due", type=int, help="how many schedules are due at once (20,000)")
    parser.add_argument("--database", choices=stage.DATABASES, action="append", help="only this one")


def measure(options: argparse.Namespace) -> Report:
    """Measure one beat and two on each database."""
    due = options.due or (200 if options.quick else 20_000)
    figures: list[Figure] = []
    for kind in options.database or stage.DATABASES:
        one, cpu = measure_one(kind, due, 1)
        two, both = measure_one(kind, due, 2)
        figures += [
            below(8, f"{kind}: all sent by one beat", one, "s", f"{cpu:.1f} s of CPU"),
            below(one, f"{kind}: all sent by two beats", two, "s", f"{both:.1f} s of CPU"),
        ]
    about = f"{due:,} schedules due in the same instant; from that to the last message in the broker."
    return Report(name="burst", about=about, figures=figures)


BENCHMARK = Benchmark(
    name="burst",
    about="20,000 schedules due in the same instant",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
