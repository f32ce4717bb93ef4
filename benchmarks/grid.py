"""``python -m benchmarks.grid``: a schedule of every second for ten minutes: is each instant on its grid?"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime, timedelta

from sqlalchemy import select

from benchmarks import stage
from benchmarks.arrivals import Arrivals
from benchmarks.beat import EVERY
from benchmarks.report import Benchmark, Figure, Report, at_least, below, median, percentile, run
from benchmarks.schedulers.ours import Ours
from benchmarks.schedulers.scheduler import Planned
from llmtasks.store.rows import runs

#: Between the writing of the schedule and its first instant.
LEAD = timedelta(seconds=4)
#: Seconds after the last instant in which its message may come.
SETTLE = 3.0
#: Milliseconds by which the machine's other work may move the median lateness. A schedule that counts from its last run
#: would drift by what each one takes, a thousand times as much in the end.
DRIFT = 100


def measure_one(kind: str, seconds: int) -> list[Figure]:
    """One database: every instant's run in the ledger, and its message in the broker."""
    with Ours(kind, careful=True) as scheduler, Arrivals(scheduler.broker) as arrivals:
        beat = scheduler.beat()
        # Not on a whole second: the grid is the schedule's own.
        first = datetime.now(UTC).replace(microsecond=123_457) + LEAD
        scheduler.plan([Planned(name="grid", every=EVERY, first=first)])
        wanted = [first + EVERY * at for at in range(seconds)]
        time.sleep((wanted[-1] - datetime.now(UTC)).total_seconds() + SETTLE)
        beat.terminate()
        with stage.database_of(scheduler.project) as database, database.reading() as connection:
            rows = connection.execute(select(runs.c.scheduled_for, runs.c.stands_for).where(runs.c.name == "grid"))
            stands_for = {row.scheduled_for: row.stands_for for row in rows}
        firings = scheduler.firings(arrivals.since(first), EVERY)
    grid = set(wanted)
    exact = [at for at in wanted if stands_for.get(at) == 1]
    strays = [at for at in stands_for if (at - first) % EVERY]
    late = {item.instant: 1000 * (item.at - item.instant).total_seconds() for item in reversed(firings)}
    lateness = [late[at] for at in wanted if at in late]
    part = max(1, seconds // 10)
    drift = median(lateness[-part:]) - median(lateness[:part])
    p50, p99 = (percentile(lateness, share) for share in (0.5, 0.99))
    said = (
        f"lateness in the last tenth against the first; p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {max(lateness):.0f} ms"
    )
    sent = sum(item.instant in grid for item in firings)
    beside = f"of {seconds}; {sent - len(lateness)} copies of messages"
    return [
        at_least(seconds, f"{kind}: instants with a run of their own", len(exact), "", beside),
        below(1, f"{kind}: runs beside the grid", len(strays), "", "to the microsecond"),
        below(DRIFT, f"{kind}: drift", abs(drift), "ms", said),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--seconds", type=int, help="how many instants there are (600)")
    parser.add_argument("--database", choices=stage.DATABASES, action="append", help="only this one")


def measure(options: argparse.Namespace) -> Report:
    """Watch a schedule on each database."""
    seconds = options.seconds or (5 if options.quick else 600)
    figures: list[Figure] = []
    for kind in options.database or stage.DATABASES:
        figures += measure_one(kind, seconds)
    return Report(
        name="grid",
        about=f"One `celery beat`, one schedule of every second, {seconds} instants of it.",
        figures=figures,
        notes=[
            'With misfire="all": where the machine stalls for more than a second, an instant is late; by the default '
            "the next one would stand for it."
        ],
    )


BENCHMARK = Benchmark(
    name="grid",
    about="a schedule of every second for ten minutes: is each instant on its grid",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
