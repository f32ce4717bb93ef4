"""``python -m benchmarks.scale``: one beat over more and more schedules, beside other schedulers."""

from __future__ import annotations

import argparse
import math
import subprocess

from benchmarks import beat, schedulers
from benchmarks.peers import PeerUnavailableError
from benchmarks.report import Benchmark, Figure, Report, at_least, below, percentile, run
from benchmarks.schedulers import OURS, SCHEDULERS
from benchmarks.schedulers.scheduler import PLAN_TIMEOUT

COLUMNS = ["schedules", "scheduler", "start", "fired/s", "CPU", "RSS", "lateness p50, p99", "a change works after"]
NOTES = (
    "Start: from the start of the process to its first message. Fired/s: messages that the broker got. A change: "
    "another process adds a schedule that is due at once; the time is from its commit to the message.",
    "PersistentScheduler counts an interval from its own start, so its first message cannot come before one second; "
    "it sees a change when it is restarted.",
    "Lateness: from the instant to the message in the broker. An instant of llmtasks is on a fixed grid; the others "
    "count an interval from the last run, so theirs is that long after the schedule's message before.",
    f"'>' is what did not come within {beat.BOUND:.0f} s.",
    "Settings of the others, the best that their documentation names: the docstrings in benchmarks/schedulers/.",
)


def measured(name: str, total: int, options: argparse.Namespace) -> tuple[list[str], list[Figure]]:
    """One scheduler at one size: its row, and for llmtasks its figures against the targets."""
    try:
        with SCHEDULERS[name](careful=False) as scheduler:
            found = beat.ran(scheduler, total, options.due, options.seconds)
    except PeerUnavailableError as absent:
        return [str(absent)], []
    except subprocess.TimeoutExpired:
        return [f"schedules not written within {PLAN_TIMEOUT} s"], []
    except AssertionError as error:
        return [str(error).splitlines()[0]], []
    p50, p99 = (percentile(found.lateness, share) for share in (0.5, 0.99))
    row = [
        seconds(found.start),
        f"{found.fired:.0f} of {options.due}",
        f"{found.cpu:.0f} %",
        f"{found.megabytes:.0f} MB",
        f"{p50:,.0f} ms, {p99:,.0f} ms" if found.lateness else "none came twice",
        "a restart" if found.change is None else seconds(found.change),
    ]
    if name not in OURS:
        return row, []
    return row, [
        at_least(0.99, f"{name}, {total:,}: fired / due", found.fired / options.due, ""),
        below(100, f"{name}, {total:,}: lateness p99", p99, "ms"),
        below(1, f"{name}, {total:,}: start", found.start, "s"),
        below(0.1, f"{name}, {total:,}: a change works after", found.change or 0.0, "s"),
    ]


def seconds(value: float) -> str:
    """A time, or that it was too long."""
    return f"> {beat.BOUND:.0f} s" if math.isinf(value) else f"{value:.2f} s"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    schedulers.add_options(parser)
    parser.add_argument(
        "--schedules", type=int, action="append", help="rows in the table; may be given again (1,000 10,000 100,000)"
    )
    parser.add_argument("--due", type=int, help="how many of them are due in every second (100)")
    parser.add_argument("--seconds", type=float, help="how long each is measured (15)")


def measure(options: argparse.Namespace) -> Report:
    """Measure every scheduler at every size, one after the other."""
    sizes = options.schedules or ([500] if options.quick else [1_000, 10_000, 100_000])
    options.due = options.due or (20 if options.quick else 100)
    options.seconds = options.seconds or (3.0 if options.quick else 15.0)
    table, figures = [COLUMNS], []
    for total in sizes:
        for name in schedulers.chosen(options):
            row, more = measured(name, total, options)
            table.append([f"{total:,}", name, *row, *[""] * (len(COLUMNS) - 2 - len(row))])
            figures += more
    return Report(
        name="scale",
        about=(
            f"One `celery beat` over so many schedules, {options.due} of them due in every second, the others in a "
            f"month; {options.seconds:g} s measured, one scheduler after the other."
        ),
        table=table,
        figures=figures,
        notes=list(NOTES),
    )


BENCHMARK = Benchmark(
    name="scale",
    about="one beat over 1,000, 10,000, 100,000 schedules, beside other schedulers",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
