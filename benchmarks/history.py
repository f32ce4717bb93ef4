"""``python -m benchmarks.history``: a ledger of 1,000,000 ended runs: its statistics, and its purge beside a beat."""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection

from benchmarks import stage
from benchmarks.arrivals import Arrivals
from benchmarks.beat import EVERY, LEAD, often
from benchmarks.report import Benchmark, Figure, Report, below, median, percentile, run, spread
from benchmarks.schedulers.ours import Ours
from llmtasks.store import totals
from llmtasks.store.database import Database
from tests.processes import Project

#: How many schedules fire in every second beside the purge.
DUE = 20
#: The runs ended evenly over so long, up to an hour ago.
SPAN = timedelta(days=60)
#: Older ones are purged: all but the last day's.
KEPT = timedelta(days=1)
ROUNDS = 5
#: A succeeded run of one of twenty functions, for each number.
COLUMNS = (
    "id, app, func_name, name, state, args, kwargs, queue, priority, attempts, max_retries, retry_delay, claim_no, "
    "worker, created_at, started_at, attempt_started_at, ended_at, run_seconds, result, delivered, publications"
)
VALUES = (
    "'old ' || n, '{app}', 'func_' || (n - n / 20 * 20), 'func', 'succeeded', '[\"a document\"]', '{{\"x\": 1}}', "
    "'celery', 5, 1, 3, 300, 1, 'celery@host', {at}, {at}, {at}, {at}, 2.0, '\"done\"', {true}, 1"
)
#: How to count to a million, and what an instant is, by database.
SPELLED = {
    "sqlite": (
        "WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n < {last})",
        "strftime('%Y-%m-%d %H:%M:%f000', {first} + n * {step}, 'unixepoch')",
        "1",
    ),
    "postgresql": (
        "WITH numbers(n) AS (SELECT generate_series(0, {last}))",
        "to_timestamp({first} + n * {step})",
        "true",
    ),
}


def fill(tx: Connection, total: int) -> None:
    """Write the runs."""
    numbers, instant, true = SPELLED[tx.dialect.name]
    first = datetime.now(UTC) - SPAN - timedelta(hours=1)
    at = instant.format(first=first.timestamp(), step=SPAN.total_seconds() / total)
    values = VALUES.format(app=stage.APP, at=at, true=true)
    counted = numbers.format(last=total - 1)
    select = f"SELECT {values} FROM numbers"
    if tx.dialect.name == "sqlite":
        tx.exec_driver_sql(f"{counted} INSERT INTO llmtasks_runs ({COLUMNS}) {select}")
    else:
        tx.exec_driver_sql(f"INSERT INTO llmtasks_runs ({COLUMNS}) {counted} {select}")
        tx.exec_driver_sql("ANALYZE llmtasks_runs")  # as its autovacuum does, which needs a minute


def sum_past(database: Database) -> None:
    """Sum each hour, as keepers do when it is over."""
    while totals.sum_next_hour(database, stage.APP, datetime.now(UTC)):
        pass


def statistics_taken(project: Project) -> list[float]:
    """Milliseconds of ``TaskMonitor.get_statistics`` over all of it, in a process of the project's."""
    said = project.python(
        f"""
        import time
        from datetime import timedelta
        from llmtasks import TaskMonitor

        for _ in range({ROUNDS + 1}):
            began = time.perf_counter()
            TaskMonitor.get_statistics_sync(since=timedelta(days={SPAN.days + 1}))
            print(time.perf_counter() - began)
        """
    )
    return [float(line) * 1000 for line in said.split()][1:]


def measure_one(kind: str, total: int) -> list[Figure]:
    """One database."""
    with Ours(kind, careful=False) as scheduler, Arrivals(scheduler.broker) as arrivals:
        with stage.database_of(scheduler.project) as database:
            with database.transaction() as tx:
                fill(tx, total)
            sum_past(database)
        taken = statistics_taken(scheduler.project)
        scheduler.plan(often(DUE))
        beat = scheduler.beat()
        time.sleep(LEAD.total_seconds() + 2)
        quiet = datetime.now(UTC)
        time.sleep(5)
        began = datetime.now(UTC)
        deleted = scheduler.project.python(
            f"""
            from llmtasks.dispatch import station
            from llmtasks.store import purging
            from datetime import timedelta

            at = station()
            print(sum(purging.purge(at.database, at.name, at.database.now() - timedelta(days={KEPT.days}))))
            """,
            timeout=1800,
        )
        over = datetime.now(UTC)
        time.sleep(1)
        firings = scheduler.firings(arrivals.since(quiet), EVERY)
        beat.terminate()
    before, during = (
        [(item.at - item.instant).total_seconds() * 1000 for item in firings if since <= item.instant < until]
        for since, until in ((quiet, began), (began, over))
    )
    seconds = (over - began).total_seconds()
    late = f"p99 {percentile(during, 0.99):.0f} ms, {percentile(before, 0.99):.0f} ms before; {len(during):,} runs"
    return [
        below(200, f"{kind}: statistics over all runs", median(taken), "ms", spread(taken)),
        below(
            50,
            f"{kind}: a tick is later while runs are purged",
            max(during) - percentile(before, 0.5),
            "ms",
            f"the latest, against the median before; {late}",
        ),
        Figure(
            name=f"{kind}: runs purged in a second",
            value=int(deleted) / seconds,
            unit="/s",
            beside=f"{int(deleted):,} runs in {seconds:.0f} s",
        ),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--runs", type=int, help="how many ended runs there are (1,000,000)")
    parser.add_argument("--database", choices=stage.DATABASES, action="append", help="only this one")


def measure(options: argparse.Namespace) -> Report:
    """Measure each database."""
    total = options.runs or (2_000 if options.quick else 1_000_000)
    figures: list[Figure] = []
    for kind in options.database or stage.DATABASES:
        figures += measure_one(kind, total)
    about = (
        f"A ledger of {total:,} runs that ended in {SPAN.days} days; all but the last day's are purged while one "
        f"`celery beat` fires {DUE} schedules a second."
    )
    return Report(name="history", about=about, figures=figures)


BENCHMARK = Benchmark(
    name="history",
    about="a ledger of 1,000,000 ended runs: statistics, and a purge beside a beat",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
