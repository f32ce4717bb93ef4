"""Clocks that step by an hour, or that differ by minutes: schedules go on, instants run once, nobody is called lost."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from llmtasks import Run, Task
from llmtasks.states import RunState
from tests.clocks import Clock, library
from tests.conftest import do_without
from tests.ledger import QUICK, Ledger, project_with
from tests.processes import CeleryProcess, Project
from tests.servers import PostgreSQL, valkey
from tests.waiting import wait_until

TASKS = """
    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="passes", max_retries=3, retry_delay=0)
    async def passes(name):
        note(name)
        await gate(name)
        return "done"


    @task_registry.register(name="tick", interval_minutes=1 / 60, max_retries=3, overlap="allow")
    def tick():
        note("tick")
"""
HOUR = 3600.0
#: Far less than clocks are off here, and more than a busy machine keeps a process waiting.
LEASES = QUICK | {"LLMTASKS_LEASE": "6"}

pytestmark = [pytest.mark.redis, pytest.mark.fault]


@pytest.fixture
def new_clock(tmp_path: Path) -> Callable[[str], Clock]:
    found = library()
    if found is None:
        do_without("no libfaketime: apt-get install libfaketime")
    return lambda name: Clock(tmp_path / f"{name}.clock", found)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    with project_with(tmp_path, TASKS, **LEASES) as project:
        yield project


@pytest.fixture
def project_on_postgresql(tmp_path: Path, postgresql_server: PostgreSQL) -> Iterator[Project]:
    with valkey(tmp_path / "broker", unix=True) as broker:
        url = postgresql_server.create_database("clocks")
        project = Project(tmp_path / "project", broker=broker, database_url=url)
        project.environ.update(LEASES)
        project.tasks(TASKS)
        project.python("from llmtasks.dispatch import station; station().database.migrate()")
        try:
            yield project
        finally:
            project.close()


def ticks(ledger: Ledger) -> list[Run]:
    """The runs of the every-second schedule, in the order in which they were made known."""
    return [run for run in ledger.all("tick") if run.state is RunState.SUCCEEDED and run.delivered]


def goes_on_at(ledger: Ledger, offset: float, count: int = 3) -> None:
    """Wait until as many instants ran that are within ten seconds of a clock that is so far off."""

    def near() -> bool:
        now = datetime.now(UTC) + timedelta(seconds=offset)
        instants = [run.scheduled_for for run in ticks(ledger) if run.scheduled_for is not None]
        return sum(abs(now - instant) < timedelta(seconds=10) for instant in instants) >= count

    wait_until(near, 40, f"the schedule to run at {offset:+g} s")


def test_steps_of_the_clock(project: Project, new_clock: Callable[[str], Clock]) -> None:
    """An hour forward: one run stands for it. An hour back: the next second runs, and no instant of the hour again."""
    clock = new_clock("host")
    clock.give_to(project)
    processes: list[CeleryProcess] = [project.worker(), project.beat()]
    ledger = Ledger(project)
    tasks: Any = project.app.tasks
    running = tasks["passes"].delay("meanwhile")
    ledger.notes("meanwhile", 1)
    goes_on_at(ledger, 0)

    clock.put(HOUR)
    goes_on_at(ledger, HOUR)
    (coalesced,) = [run for run in ticks(ledger) if run.stands_for > 1000]
    clock.put(0)
    before = datetime.now(UTC)
    processes[1].wait_for_log("the clock was put back")
    wait_until(lambda: sum((run.scheduled_for or before) > before for run in fired(ledger, before)) >= 3, 20)
    ledger.open_gate("meanwhile")

    assert abs(coalesced.stands_for - HOUR) < 60
    assert running.get(timeout=60) == "done"
    run = ledger.ends(running.id)
    assert (run.attempts, run.losses) == (1, 0)
    assert ledger.notes_now("meanwhile") == [""]
    check_instants(ledger, processes)


def fired(ledger: Ledger, since: datetime) -> list[Run]:
    """The runs of instants within a minute after ``since``."""
    instants = [(run, run.scheduled_for) for run in ticks(ledger)]
    return [run for run, at in instants if at is not None and since <= at < since + timedelta(minutes=1)]


def check_instants(ledger: Ledger, processes: list[CeleryProcess]) -> None:
    """No instant has two runs, no run two calls; nothing was lost, nothing failed, everybody lives."""
    for process in reversed(processes):
        assert process.terminate() == 0
    runs = ledger.all("tick")
    instants = [run.scheduled_for for run in runs]
    assert len(set(instants)) == len(instants)
    assert {run.losses for run in runs} == {0}
    assert len(ledger.notes_now("tick")) == sum(run.attempts for run in runs)
    for process in processes:
        assert "Traceback" not in process.log()
        assert "lost their worker" not in process.log()


@pytest.mark.postgresql
def test_clocks_that_are_minutes_apart(project_on_postgresql: Project, new_clock: Callable[[str], Clock]) -> None:
    """One host five minutes behind, one ahead: PostgreSQL's clock counts, for schedules, heartbeats and one-offs."""
    project = project_on_postgresql
    processes: list[CeleryProcess] = []
    for name, seconds, start in (
        ("behind", -300, project.worker),
        ("ahead", 300, project.worker),
        ("beat ahead", 300, project.beat),
        ("beat behind", -300, project.beat),
    ):
        clock = new_clock(name)
        clock.put(seconds)
        clock.give_to(project)
        processes.append(start())
    ledger = Ledger(project)
    tasks: Any = project.app.tasks
    running = [tasks["passes"].delay(f"long {number}") for number in range(2)]
    for number in range(2):
        ledger.notes(f"long {number}", 1)
    goes_on_at(ledger, 0)
    at = datetime.now(UTC) + timedelta(seconds=2)
    once = Task(func_name="passes", params={"name": "once"}, scheduled_at=at).save_sync()

    ledger.notes("once", 1)
    late = datetime.now(UTC) - at
    for name in ("long 0", "long 1", "once"):
        ledger.open_gate(name)

    assert timedelta() <= late < timedelta(seconds=20)
    (of_once,) = [run for run in ledger.all("passes") if run.schedule_id == once.id]
    assert ledger.ends(of_once.id).stands_for == 1
    for result in running:
        assert result.get(timeout=60) == "done"
        run = ledger.ends(result.id)
        assert (run.attempts, run.losses) == (1, 0)
        assert run.started_at is not None
        assert run.created_at <= run.started_at
        assert abs(datetime.now(UTC) - run.created_at) < timedelta(minutes=2)
    assert max(run.stands_for for run in ticks(ledger)) < 60  # more than one is a slow machine, not a clock
    check_instants(ledger, processes)
