"""``python -m benchmarks.beat``: 100,000 schedules, 100 due in every second, one real ``celery beat``."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psutil

from benchmarks import stage
from benchmarks.arrivals import Arrivals
from benchmarks.report import Benchmark, Figure, Report, at_least, below, median, percentile, run
from benchmarks.schedulers.ours import Ours
from benchmarks.schedulers.scheduler import Planned, Scheduler
from tests.processes import CeleryProcess, Project

EVERY = timedelta(seconds=1)
FAR = timedelta(days=30)
#: What is between the writing of the schedules and the first of most of them: beat should run by then.
LEAD = timedelta(seconds=8)
#: Seconds after the first firing that are left out of the lateness: the first tick makes up for the time before it.
SETTLE = 2.0
#: Seconds in which a started beat has to send something, and in which a change has to work.
BOUND = 60.0
STARTING = "beat: Starting..."
#: Milliseconds that the p99 of lateness may be: with so many due in a second, and with more.
LATE, MANY, LATE_BEYOND = 50, 1_000, 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One run of beat; times in seconds, infinite beyond ``BOUND``; lateness in milliseconds."""

    starting: float
    start: float
    fired: float
    missing: int
    lateness: list[float]
    cpu: float
    megabytes: float
    #: Until a change by another process works; None where beat has to be restarted.
    change: float | None


def rare(count: int) -> list[Planned]:
    """Schedules a month away."""
    first = datetime.now(UTC) + FAR
    return [Planned(name=f"far {at}", every=FAR, first=first + timedelta(seconds=at)) for at in range(count)]


def often(count: int) -> list[Planned]:
    """The schedules of every second: one that is due at once, the others spread over a second, beginning in a while.

    Celery counts an interval from the last run: all that are overdue when beat starts would stay together for ever.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    later = [Planned(name=f"often {at}", every=EVERY, first=now + LEAD + EVERY * at / count) for at in range(1, count)]
    return [Planned(name="often 0", every=EVERY, first=now), *later]


def ran(scheduler: Scheduler, total: int, due: int, seconds: float, *, starts: int = 1, beats: int = 1) -> Ran:
    """Write the schedules, start a beat so many times, let the last one run for ``seconds``, make a change.

    Of several beats that run together, the CPU is that of all, the memory that of the last.
    """
    scheduler.plan(rare(total - due))
    scheduler.plan(frequent := often(due))
    with Arrivals(scheduler.broker) as arrivals:
        begun: list[tuple[float, float]] = []
        for _ in range(starts - 1):
            beat, *taken = started(scheduler, arrivals)
            begun.append((taken[0], taken[1]))
            beat.terminate()
        beat, starting, start = started(scheduler, arrivals)
        begun.append((starting, start))
        running = [beat, *(scheduler.beat(number) for number in range(2, beats + 1))]
        time.sleep(max(0.0, (frequent[-1].first - datetime.now(UTC)).total_seconds()) + SETTLE)
        since, used = datetime.now(UTC), sum(map(stage.cpu_seconds, running))
        time.sleep(seconds)
        until, used = datetime.now(UTC), sum(map(stage.cpu_seconds, running)) - used
        memory = megabytes(beat)
        time.sleep(1.0)  # what was due at the end of the window may be sent a little later
        firings = scheduler.firings(arrivals.since(stage.started_at(beat)), EVERY)
        written = scheduler.change("changed")
        change = None if written is None else seconds_until(arrivals, written, "changed")
        for item in running:
            item.terminate()
    span = (until - since).total_seconds()
    return Ran(
        starting=median(item[0] for item in begun),
        start=median(item[1] for item in begun),
        fired=sum(item.at < until for item in arrivals.since(since)) / span,
        missing=max(0, int(due * span) - sum(since <= item.instant < until for item in firings)),
        lateness=[(item.at - item.instant).total_seconds() * 1000 for item in firings if since <= item.at < until],
        cpu=100 * used / span,
        megabytes=memory,
        change=change,
    )


def started(scheduler: Scheduler, arrivals: Arrivals) -> tuple[CeleryProcess, float, float]:
    """A beat with schedules that are due, its seconds to the line that says so and to its first message."""
    beat = scheduler.beat()
    began = stage.started_at(beat)
    first = seconds_until(arrivals, began)
    return beat, (stage.logged_at(beat, STARTING) - began).total_seconds(), first


def seconds_until(arrivals: Arrivals, since: datetime, name: str | None = None) -> float:
    """Seconds from then to the first message, or to the first of this schedule; infinite beyond ``BOUND``."""
    over = time.monotonic() + BOUND
    while time.monotonic() < over:
        for item in arrivals.since(since - EVERY):
            if (name is None and item.at >= since) or item.name == name:
                return max(0.0, (item.at - since).total_seconds())
        time.sleep(0.02)
    return math.inf


def measure_one(kind: str, total: int, due: int, seconds: float, *, starts: int, beats: int) -> list[Figure]:
    """One database: the start of a plain ``celery beat``, then ours, against the targets."""
    with Ours(kind, careful=False) as scheduler:
        plain = [plain_start(scheduler.project) for _ in range(starts)]
        found = ran(scheduler, total, due, seconds, starts=starts + 1, beats=beats)
        without_flower = memory_without_flower(scheduler.project)
    plain_starting, plain_megabytes = (median(values) for values in zip(*plain, strict=True))
    p50, p99 = (percentile(found.lateness, share) for share in (0.5, 0.99))
    late = f"p50 {p50:.0f} ms, max {max(found.lateness, default=0):.0f} ms of {len(found.lateness):,} runs"
    fired = f"{found.fired:.1f} of {due} a second, {found.missing} instants without a run of their own"
    start = f"'Starting' logged after {found.starting:.2f} s; plain celery beat's after {plain_starting:.2f} s"
    memory = f"{without_flower:.1f} where Flower is not installed; plain celery beat {plain_megabytes:.1f} MB"
    return [
        at_least(0.99, f"{kind}: fired / due", found.fired / due, "", fired),
        below(LATE if due <= MANY else LATE_BEYOND, f"{kind}: lateness p99", p99, "ms", late),
        below(1, f"{kind}: process start to first run sent", found.start, "s", start),
        below(80, f"{kind}: RSS", found.megabytes, "MB", memory),
        below(45 * beats, f"{kind}: CPU", found.cpu, "% of a core", f"{1e4 * found.cpu / found.fired:.0f} us a run")
        if due <= MANY
        else Figure(name=f"{kind}: CPU", value=found.cpu, unit="% of a core"),
    ]


def plain_start(project: Project) -> tuple[float, float]:
    """A plain ``celery beat`` with nothing to do: seconds to the line that says that it started, and its megabytes."""
    beat: CeleryProcess = project.beat("-S", "celery.beat:PersistentScheduler", "-s", str(project.folder / "plain"))
    taken = (stage.logged_at(beat, STARTING) - stage.started_at(beat)).total_seconds()
    time.sleep(0.5)
    memory = megabytes(beat)
    beat.terminate()
    return taken, memory


def memory_without_flower(project: Project) -> float:
    """The megabytes of our beat where Flower is not installed, as on a host for beat alone."""
    project.write("flower/__init__.py", 'raise ImportError("hidden")\n')
    beat = project.beat()
    time.sleep(SETTLE)
    memory = megabytes(beat)
    beat.terminate()
    return memory


def megabytes(beat: CeleryProcess) -> float:
    """Its resident memory."""
    return float(psutil.Process(beat.pid).memory_info().rss) / 1e6


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--schedules", type=int, help="rows in the table (100,000)")
    parser.add_argument("--due", type=int, help="how many of them are due in every second (100)")
    parser.add_argument("--seconds", type=float, help="how long is measured (30)")
    parser.add_argument("--beats", type=int, default=1, help="how many beats run together (1)")
    parser.add_argument("--database", choices=stage.DATABASES, action="append", help="only this one")


def measure(options: argparse.Namespace) -> Report:
    """Measure beat on each database."""
    total = options.schedules or (2_000 if options.quick else 100_000)
    due = options.due or (20 if options.quick else 100)
    seconds = options.seconds or (3.0 if options.quick else 30.0)
    figures: list[Figure] = []
    for kind in options.database or stage.DATABASES:
        figures += measure_one(kind, total, due, seconds, starts=1 if options.quick else 3, beats=options.beats)
    return Report(
        name="beat",
        about=(
            f"{options.beats} `celery beat` over {total:,} schedules, {due} of them due in every second and spread "
            f"over it; {seconds:g} s measured. Lateness: the instant of the schedule until the broker has the message."
        ),
        figures=figures,
        notes=[
            "Every `celery` command loads the plug-ins of all installed packages: "
            "the plain beat has llmtasks, SQLAlchemy and Flower in it too."
        ],
    )


BENCHMARK = Benchmark(
    name="beat",
    about="100,000 schedules, 100 due in every second, one real celery beat",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
