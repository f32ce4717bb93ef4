"""Broker and database away together: for ten seconds here, for five minutes with ``make soak-outage``."""

import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmtasks import Run
from llmtasks.states import RunState
from tests.conftest import or_without
from tests.ledger import Ledger
from tests.processes import CeleryProcess, Project
from tests.servers import PostgreSQL, postgresql, valkey
from tests.waiting import wait_until

#: How long both are away.
SECONDS = float(os.environ.get("OUTAGE_SECONDS", "10"))
#: Lines that a process may write about one outage.
LINES = 20
#: Seconds after which work goes on when both are back.
BACK = 3.0

TASKS = """
    import time

    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="passes", max_retries=1, retry_delay=0)
    async def passes(name):
        note(name)
        await gate(name)
        return "done"


    @task_registry.register(name="tick", interval_minutes=1 / 60, max_retries=1, overlap="allow", misfire="once")
    def tick():
        note("tick", time.time())
"""

pytestmark = [
    pytest.mark.redis, pytest.mark.postgresql, pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(SECONDS + 170)
]  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PostgreSQL]:
    with or_without(postgresql(tmp_path)) as server:
        yield server


@pytest.fixture
def project(tmp_path: Path, server: PostgreSQL) -> Iterator[Project]:
    """At the settings that people have: nothing is made quick here."""
    with valkey(tmp_path / "broker", unix=True) as broker:
        project = Project(tmp_path / "project", broker=broker, database_url=server.create_database())
        project.tasks(TASKS)
        project.python("from llmtasks.dispatch import station; station().database.migrate()")
        try:
            yield project
        finally:
            project.close()


def lines_of(process: CeleryProcess) -> int:
    """How many lines a process has written that are not about a run which came and went."""
    return sum("Task tick" not in line and "Task passes" not in line for line in process.log().splitlines())


def ticks(ledger: Ledger) -> list[Run]:
    """The runs of the schedule, earliest instant first."""
    return sorted(ledger.all("tick"), key=lambda run: run.scheduled_for or run.created_at)


def test_both_servers_away(project: Project, server: PostgreSQL) -> None:
    """All live and say little; work goes on within three seconds of the return, and each instant has its one run."""
    processes = [project.worker(), project.worker(pool="asyncio", concurrency=100), project.beat()]
    ledger = Ledger(project)
    running = project.python('from tasks import passes; print(passes.delay("meanwhile").id)').strip()
    ledger.notes("meanwhile", 1)
    ledger.notes("tick", 2)
    before = {process.name: lines_of(process) for process in processes}

    project.broker.kill()
    server.kill()
    away_since = time.monotonic()
    ledger.open_gate("meanwhile")
    wait_until(lambda: time.monotonic() - away_since >= SECONDS or not all_live(processes), SECONDS + 60)
    assert all_live(processes)
    project.broker.start()
    server.start()
    back = time.time()

    def after() -> list[float]:
        return [seconds for seconds in map(float, ledger.notes_now("tick")) if seconds > back]

    wait_until(after, 60, "the schedule to run again")
    late = min(after()) - back
    wait_until(lambda: len(after()) >= 5, 60, "the schedule to go on")
    said = {process.name: lines_of(process) - before[process.name] for process in processes}
    run = ledger.ends(running)
    processes[2].terminate()
    wait_until(lambda: all(run.state.is_final and run.delivered for run in ticks(ledger)), 60, "all to end")

    assert late <= BACK
    assert max(said.values()) <= LINES, said
    assert all_live(processes[:2])
    assert (run.state, run.attempts, run.losses) == (RunState.SUCCEEDED, 1, 0)
    assert ledger.notes_now("meanwhile") == [""]
    check_instants(ticks(ledger), len(ledger.notes_now("tick")))


def all_live(processes: list[CeleryProcess]) -> bool:
    return all(process.running for process in processes)


def check_instants(runs: list[Run], calls: int) -> None:
    """Each instant is in one run, by itself or by ``stands_for``; all of them succeeded, each called once."""
    for earlier, later in pairwise(runs):
        assert earlier.scheduled_for is not None
        assert later.scheduled_for is not None
        seconds: Any = (later.scheduled_for - earlier.scheduled_for).total_seconds()
        assert seconds == later.stands_for, (earlier, later)
    assert {run.state for run in runs} == {RunState.SUCCEEDED}
    assert [run for run in runs if run.losses] == []
    assert calls == sum(run.attempts for run in runs)
