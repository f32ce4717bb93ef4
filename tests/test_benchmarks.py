"""The benchmarks run, at a tiny size; what they measure is asserted nowhere."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import peers, workers
from benchmarks.__main__ import BENCHMARKS
from benchmarks.marked import Marked
from benchmarks.report import run
from benchmarks.stage import cpu_seconds_of
from benchmarks.systems import marks
from tests.children import lives
from tests.waiting import wait_until

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
    "workers": [],
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


def test_workers_measures_each_work_with_llmtasks_and_plain_celery() -> None:
    """Each work gives a number for a pool of llmtasks and one of Celery; without --peers no other system is needed."""
    report = benchmark("workers")

    check(report, "workers")
    tables = report["tables"]
    assert isinstance(tables, dict)
    assert [title.partition(":")[0] for title in tables] == list(workers.WORKS)
    for _, *rows in tables.values():
        measured = {name: cell for name, cell, *_ in rows}
        assert list(measured) == list(workers.QUICK)
        assert "-" not in (measured["llmtasks-threads"], measured["celery-prefork"]), rows


def test_system_that_cannot_be_installed_is_a_row_that_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The others are measured all the same."""
    absent = "benchmarks-no-such-package==0"
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(peers, "_made", {})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(peers, "PEERS", {"arq": (absent,)})

    workers_run = ["--quick", "--json", "--peers", "arq,celery-threads", "--works", "publish"]
    run(workers.BENCHMARK, workers_run)

    (report,) = json.loads(capsys.readouterr().out)["reports"]
    (_, arq, celery), *_ = report["tables"].values()
    assert arq[1] == "-"
    assert "cannot be installed" in arq[-1]
    assert absent in arq[-1]
    assert celery[1].endswith("/s")


def test_tasks_that_ended_twice_are_counted(tmp_path: Path) -> None:
    """A task that was run again after it had ended is found in what the tasks noted; those for warming up are not."""
    records = [(marks.START, 1, 10), (marks.END, 1, 20), (marks.START, 2, 11), (marks.END, 1, 30), (marks.END, -1, 5)]
    path = tmp_path / "marks.bin"
    path.write_bytes(b"".join(marks.RECORD.pack(*record) for record in records) + b"half a record")

    marked = Marked(path)
    marked.look()

    assert (marked.twice, marked.warm, marked.starts, marked.ends) == (1, 1, {1: 10, 2: 11}, {1: 30})
    assert marked.seconds == 20 / 1e9


def test_workers_that_is_asked_to_end_leaves_no_child_of_a_worker_behind(tmp_path: Path) -> None:
    """SIGTERM ends what a worker started too, which does not die with the benchmark by itself."""
    code = """
        import os, signal, sys, time
        from pathlib import Path
        from benchmarks.workers import orderly
        from tests.children import ChildProcess

        worker = "import subprocess as s; child = s.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
        log = Path(sys.argv[1])
        with orderly():
            ChildProcess([sys.executable, "-c", worker], name="worker", log=log, cwd=log.parent).wait_for_log("\\n")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        """
    log = tmp_path / "worker.log"

    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), log], cwd=REPOSITORY, timeout=60)

    assert done.returncode == 128 + signal.SIGTERM
    child = int(log.read_text())
    wait_until(lambda: not psutil.pid_exists(child) or not lives(psutil.Process(child)), 10, "the child to end")


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
