"""The benchmarks run, at a tiny size; what they measure is asserted nowhere."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.stage import cpu_seconds_of

REPOSITORY = Path(__file__).parents[1]
#: Options that make one small.
TINY = {
    "beat": ["--schedules", "200", "--due", "5", "--seconds", "1"],
    "burst": ["--due", "50", "--database", "sqlite"],
    "dev": [],
    "faults": ["--schedules", "250", "--fault", "kill"],
    "grid": ["--seconds", "3", "--database", "sqlite"],
    "history": ["--runs", "1000", "--database", "sqlite"],
    "imports": ["--rounds", "1"],
    "kills": ["--seconds", "3", "--database", "sqlite"],
    "ledger": ["--runs", "10", "--rounds", "1"],
    "publish": ["--messages", "10", "--rounds", "1"],
    "scale": ["--schedules", "200", "--due", "5", "--seconds", "1"],
    "transport": ["--messages", "50", "--rounds", "1"],
}

pytestmark = [pytest.mark.redis, pytest.mark.slow]


def benchmark(name: str, *arguments: str) -> dict[str, object]:
    """What a benchmark reports."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", *TINY[name], *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["machine"]["cpu"]
    (report,) = said["reports"]
    return report


def check(report: dict[str, object], name: str) -> None:
    assert report["name"] == name
    figures = report["figures"]
    assert isinstance(figures, list)
    assert figures
    assert all(item["name"] and isinstance(item["value"], int | float) for item in figures)


@pytest.mark.parametrize("name", ["burst", "dev", "grid", "history", "imports", "publish", "transport"])
def test_benchmark_reports_its_figures(name: str) -> None:
    """Each of these measures something and says it."""
    check(benchmark(name), name)


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
@pytest.mark.parametrize("name", ["beat", "ledger"])
def test_benchmark_reports_its_figures_for_a_database(name: str, database: str) -> None:
    """These measure one database after the other."""
    report = benchmark(name, "--database", database)

    check(report, name)
    assert database in json.dumps(report["figures"])


@pytest.mark.postgresql
@pytest.mark.fault
def test_killed_beat_loses_and_doubles_nothing_in_the_fault_table() -> None:
    """Each instant has one start after a beat was killed in a burst; without --peers only ours is in the table."""
    report = benchmark("faults")

    check(report, "faults")
    titles, cells = report["table"]
    assert titles[1:] == ["llmtasks-sqlite", "llmtasks-postgresql"]
    assert all(cell.startswith("0 lost, 0 doubled") for cell in cells[1:])


@pytest.mark.fault
def test_beats_killed_in_turn_lose_and_double_nothing() -> None:
    """Whoever is killed, each instant has one start; the take-over is measured, not asserted."""
    report = benchmark("kills")

    check(report, "kills")
    figures = report["figures"]
    assert isinstance(figures, list)
    assert [item["value"] for item in figures[:2]] == [0, 0]


@pytest.mark.postgresql
def test_scale_has_a_row_for_each_scheduler() -> None:
    """Each scheduler is measured at each size; without --peers only ours."""
    report = benchmark("scale")

    check(report, "scale")
    assert [row[:2] for row in report["table"][1:]] == [["200", "llmtasks-sqlite"], ["200", "llmtasks-postgresql"]]


def test_every_benchmark_is_tried() -> None:
    """A new benchmark is to be in the table above."""
    assert set(TINY) == set(BENCHMARKS)


def test_cpu_time_is_measured_finer_than_a_clock_tick() -> None:
    """A millisecond of work is not zero: figures are divided by each other."""
    before, began = cpu_seconds_of(os.getpid()), time.process_time()
    while time.process_time() - began < 0.001:
        pass
    os.sched_yield()  # the kernel counts when a process gives the core away

    assert cpu_seconds_of(os.getpid()) > before
