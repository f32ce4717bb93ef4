"""``python -m benchmarks.beat``: 100,000 schedules, 100 due in every second, one real ``celery beat``."""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psutil
from sqlalchemy import func, select

from benchmarks import stage
from benchmarks.report import Benchmark, Figure, Report, at_least, below, median, percentile, run
from llmtasks.store import schedules
from llmtasks.store.database import Database
from llmtasks.store.rows import runs
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Interval
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

EVERY = timedelta(seconds=1)
FAR = timedelta(days=30)
#: Seconds after the first firing that are left out of the lateness: the first tick makes up for the time before it.
SETTLE = 2.0
STARTING = "beat: Starting..."
#: Rows of one transaction while the table is filled.
SLICE = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One run of beat; times in seconds, lateness in milliseconds."""

    database: str
    plain_starting: float
    plain_megabytes: float
    starting: float
    start: float
    due: int
    without_flower: float
    fired: float
    missing: int
    lateness: list[float]
    cpu: float
    megabytes: float


def fill(database: Database, total: int, due: int) -> None:
    """Store schedules a month away, then the ``due`` of every second, spread over it."""
    now = datetime.now(UTC)
    far = [_schedule(f"far {number}", FAR, now + FAR + timedelta(seconds=number)) for number in range(total - due)]
    for begin in range(0, len(far), SLICE):
        with database.transaction() as tx:
            schedules.put_many(tx, far[begin : begin + SLICE], now)
    now = datetime.now(UTC).replace(microsecond=0)
    with database.transaction() as tx:
        often = [_schedule(f"often {number}", EVERY, now + EVERY * number / due) for number in range(due)]
        schedules.put_many(tx, often, now)


def _schedule(name: str, every: timedelta, first: datetime) -> Schedule:
    return Schedule(
        id=str(uuid.uuid4()),
        app=stage.APP,
        name=name,
        func_name="recorded",
        # Nobody runs what is sent here: by any other policy the second instant would be skipped.
        options={"overlap": "allow"},
        next_run_at=first,
        **trigger_columns(Interval(every, first)),
    )


def measure_one(kind: str, total: int, due: int, seconds: float, *, starts: int) -> Ran:
    """One database: the start of a plain ``celery beat``, then ours for ``seconds``."""
    with stage.project(kind) as project, stage.database_of(project) as database:
        plain = [plain_start(project) for _ in range(starts)]
        fill(database, total, due)
        ours = [our_start(project, database)[:2] for _ in range(starts)]
        starting, start, beat = our_start(project, database, keep=True)
        ours.append((starting, start))
        time.sleep(SETTLE)
        since, used = datetime.now(UTC), stage.cpu_seconds(beat)
        time.sleep(seconds)
        until, used = datetime.now(UTC), stage.cpu_seconds(beat) - used
        memory = megabytes(beat)
        time.sleep(1.0)  # what was due at the end of the window may be published a little later
        times = sent_times(database)
        assert " ERROR" not in beat.log(), beat.tail()
        beat.terminate()
        without_flower = memory_without_flower(project)
    span = (until - since).total_seconds()
    inside = [(due_at, sent) for due_at, sent in times if since <= due_at < until]
    return Ran(
        database=kind,
        plain_starting=median(item[0] for item in plain),
        plain_megabytes=median(item[1] for item in plain),
        starting=median(item[0] for item in ours),
        start=median(item[1] for item in ours),
        due=due,
        fired=sum(since <= sent < until for _, sent in times) / span,
        missing=max(0, int(due * span) - len(inside)),
        lateness=[(sent - due_at).total_seconds() * 1000 for due_at, sent in inside],
        cpu=100 * used / span,
        megabytes=memory,
        without_flower=without_flower,
    )


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


def our_start(project: Project, database: Database, *, keep: bool = False) -> tuple[float, float, CeleryProcess]:
    """Our beat with schedules that are due: seconds to its line and to its first message, and its process."""
    beat: CeleryProcess = project.beat()
    began = stage.started_at(beat)
    first = wait_until(lambda: first_published(database, began), 60, "the first run")
    starting = stage.logged_at(beat, STARTING)
    if not keep:
        beat.terminate()
    return (starting - began).total_seconds(), (first - began).total_seconds(), beat


def first_published(database: Database, since: datetime) -> datetime | None:
    """When the broker had the first message since then."""
    query = select(func.min(runs.c.published_at)).where(runs.c.published_at > since)
    with database.reading() as connection:
        found: datetime | None = connection.execute(query).scalar()
        return found


def sent_times(database: Database) -> Sequence[tuple[datetime, datetime]]:
    """The instant and the time of publishing of each run, one of several missed instants left out."""
    query = select(runs.c.scheduled_for, runs.c.published_at).where(
        runs.c.published_at.is_not(None), runs.c.func_name == "recorded", runs.c.stands_for == 1
    )
    with database.reading() as connection:
        return [(row.scheduled_for, row.published_at) for row in connection.execute(query)]


def figures_of(ran: Ran) -> list[Figure]:
    """What one run of beat says, against the targets."""
    p50, p99 = (percentile(ran.lateness, share) for share in (0.5, 0.99))
    late = f"p50 {p50:.0f} ms, max {max(ran.lateness, default=0):.0f} ms of {len(ran.lateness):,} runs"
    fired = f"{ran.fired:.1f} of {ran.due} a second, {ran.missing} instants without a run of their own"
    start = f"'Starting' logged after {ran.starting:.2f} s; plain celery beat's after {ran.plain_starting:.2f} s"
    memory = f"{ran.without_flower:.1f} where Flower is not installed; plain celery beat {ran.plain_megabytes:.1f} MB"
    return [
        at_least(0.99, f"{ran.database}: fired / due", ran.fired / ran.due, "", fired),
        below(100, f"{ran.database}: lateness p99", p99, "ms", late),
        below(1, f"{ran.database}: process start to first run sent", ran.start, "s", start),
        below(80, f"{ran.database}: RSS", ran.megabytes, "MB", memory),
        Figure(name=f"{ran.database}: CPU", value=ran.cpu, unit="% of a core"),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--schedules", type=int, help="rows in the table (100,000)")
    parser.add_argument("--due", type=int, help="how many of them are due in every second (100)")
    parser.add_argument("--seconds", type=float, help="how long is measured (30)")
    parser.add_argument("--database", choices=stage.DATABASES, action="append", help="only this one")


def measure(options: argparse.Namespace) -> Report:
    """Measure beat on each database."""
    total = options.schedules or (2_000 if options.quick else 100_000)
    due = options.due or (20 if options.quick else 100)
    seconds = options.seconds or (3.0 if options.quick else 30.0)
    figures: list[Figure] = []
    for kind in options.database or stage.DATABASES:
        figures += figures_of(measure_one(kind, total, due, seconds, starts=1 if options.quick else 3))
    return Report(
        name="beat",
        about=(
            f"One `celery beat` over {total:,} schedules, {due} of them due in every second and spread over it; "
            f"{seconds:g} s measured. Lateness: the instant of the schedule until the broker has the message."
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
