"""The whole example, as ``make run`` starts it: broker, worker, beat, services and the demo."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from examples.ragapp import settings
from examples.ragapp.index import Index
from tests.children import ChildProcess
from tests.waiting import wait_until

pytestmark = [pytest.mark.redis, pytest.mark.slow]

ENVIRONMENT = {
    "LLMTASKS_IMPORTS": "examples.ragapp.tasks",
    "RAGAPP_PACKAGES": "0",
    "RAGAPP_INTERVAL_MINUTES": "0.05",
    "RAGAPP_RETRY_DELAY": "0.5",
}


@pytest.fixture
def home() -> Iterator[Path]:
    """A data directory whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="ragapp") as folder:
        yield Path(folder)


@pytest.fixture
def system(home: Path, tmp_path: Path) -> Iterator[ChildProcess]:
    """``llmtasks dev`` with the example's Procfile, on one folder of documents."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "schedules.md").write_text("# Schedules\n\nTo pause a schedule, call the method pause.\n")
    environment = {"LLMTASKS_HOME": str(home), "RAGAPP_DOCUMENTS": str(tmp_path / "docs"), **ENVIRONMENT}
    options = ["--procfile", "examples/ragapp/Procfile", "--no-flower"]
    dev = ChildProcess(
        [sys.executable, "-c", "from llmtasks.cli.dev import dev; dev()", *options],
        name="llmtasks dev",
        log=tmp_path / "dev.log",
        cwd=settings.PROJECT,
        environ={**os.environ, **environment},
        death_signal=signal.SIGTERM,
    )
    yield dev
    dev.close()


@pytest.mark.timeout(400)
def test_every_step_of_the_demo_goes_as_it_should(system: ChildProcess, home: Path) -> None:
    """All steps end as they say, the failures too; index and report are there; Ctrl-C ends all processes."""
    wait_until(lambda: "all steps done" in system.log_of_this_start(), 300, "the end of the demo's steps", interval=0.5)
    family = system.family()

    system.signal(signal.SIGINT)

    assert system.process.wait(90) == 0
    wait_until(lambda: not any(running(process) for process in family), 30, "no process left")
    said = system.log_of_this_start()
    assert "PROBLEM" not in said
    index = Index(home / "ragapp" / "index.db")
    assert index.search("How do I pause a schedule?")[0].title == "Schedules"
    assert index.counts()["failed"] == 1
    assert "process_document" in (home / "ragapp" / "reports" / "report.md").read_text()


def running(process: psutil.Process) -> bool:
    """Whether the process still runs; one that ended and was collected by nobody does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
