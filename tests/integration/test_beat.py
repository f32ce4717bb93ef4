"""Real ``celery beat`` processes: what is due runs once, whoever dies; what code declares becomes rows."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from llmtasks import Run, Task
from llmtasks.beat import sync
from llmtasks.dispatch import Station, station
from llmtasks.states import RunState, ScheduleState
from llmtasks.store import processes, schedules
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Cron, Interval
from tests.ledger import QUICK, Ledger, project_with
from tests.processes import Project
from tests.servers import DatabaseServer, Valkey, valkey
from tests.waiting import wait_until

TASKS = """
    from llmtasks import task_registry
    from tests.notebook import note

    @task_registry.register(name="work")
    async def work(key: str = "work"):
        note(key, "ran")
        return key

    @task_registry.register(name="often", interval_minutes=1 / 120)
    def often():
        note("often", "ran")
"""
#: Half a second, for intervals that a test can watch.
HALF = timedelta(seconds=0.5)

pytestmark = pytest.mark.redis


def soon(seconds: float = 0.0) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def one_off(key: str, at: datetime, **options: Any) -> Task:
    return Task(func_name="work", name=key, params={"key": key}, scheduled_at=at, **options).save_sync()


def interval(key: str, every: timedelta = HALF, **options: Any) -> Task:
    minutes = every / timedelta(minutes=1)
    return Task(func_name="work", name=key, params={"key": key}, interval_minutes=minutes, **options).save_sync()


def runs_of(ledger: Ledger, task: Task, count: int = 0, timeout: float = 60) -> list[Run]:
    """The runs of a Task's instants, earliest first, once there are at least ``count``."""

    def found() -> list[Run]:
        mine = [run for run in ledger.all() if run.schedule_id == task.id and run.scheduled_for is not None]
        return sorted(mine, key=lambda run: run.scheduled_for or run.created_at)

    wait_until(lambda: len(found()) >= count, timeout, f"{count} runs of {task.name}")
    return found()


def make_due(task: Task) -> datetime:
    """Pretend that the Task's next run is now."""
    now = soon()
    with station().database.transaction() as tx:
        move = schedules.Advance(
            schedule_id=task.id or "", next_at=now, last_at=None, to=ScheduleState.ACTIVE, why=None
        )
        schedules.advance(tx, [move])
    return now


def put(**values: Any) -> str:
    """Write a row that no Task could write."""
    row: dict[str, Any] = {"id": values["name"], "app": station().name, "kind": "once", "next_run_at": soon(), **values}
    with station().database.transaction() as tx:
        schedules.put(tx, Schedule(**row), soon())
    return str(row["id"])


def read(task_id: str) -> Schedule:
    with station().database.reading() as connection:
        found = schedules.get(connection, task_id)
    assert found is not None
    return found


def until_declared(*names: str) -> dict[str, Task]:
    """The declared schedules by name, once all of ``names`` are there."""

    def found() -> dict[str, Task]:
        return {task.name or "": task for task in Task.list_sync()}

    wait_until(lambda: set(names) <= set(found()), 60, f"{names} are declared")
    return found()


# -- one broker, one worker, one beat


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with project_with(tmp_path_factory.mktemp("beat"), TASKS) as project:
        project.worker()
        project.beat()
        assert project.app
        yield project


@pytest.fixture(scope="module")
def ledger(project: Project) -> Ledger:
    return Ledger(project)


def test_a_one_off_runs_once_at_its_instant_and_is_completed(ledger: Ledger) -> None:
    """Not before, not twice; the Task says that it is over."""
    task = one_off("once", soon(1))

    run = ledger.ends(runs_of(ledger, task, 1)[0].id)

    assert (run.state, run.result, run.name) == (RunState.SUCCEEDED, "once", "once")
    assert run.scheduled_for == task.scheduled_at
    assert run.started_at is not None
    assert run.started_at >= run.scheduled_for
    found = Task.get_sync("once")
    assert (found.state, found.reason, found.next_run_at) == (ScheduleState.COMPLETED, "it fired", None)
    assert found.last_run_at == task.scheduled_at
    assert ledger.notes_now("once") == ["ran"]


def test_a_change_by_another_process_takes_effect_at_once(ledger: Ledger) -> None:
    """Beat runs what this process saves within a tenth of a second, without a reload."""
    delays = []
    for number in range(7):
        before = soon()
        task = interval(f"at once {number}", timedelta(hours=1), next_run_at=before)
        delays.append((runs_of(ledger, task, 1)[0].created_at - before).total_seconds())

    assert sorted(delays)[1] < 0.1, delays


def test_intervals_stay_on_their_grid(ledger: Ledger) -> None:
    """Each instant is a whole number of intervals after the first save's, and has one run."""
    task = interval("grid")
    first = task.next_run_at
    assert first is not None

    runs = runs_of(ledger, task, 5)
    task.pause_sync()

    steps = [((run.scheduled_for or first) - first) / HALF for run in runs]
    covered = [
        step
        for run, step in zip(runs, steps, strict=True)
        for step in range(int(step) + 1 - run.stands_for, int(step) + 1)
    ]
    assert all(step == int(step) for step in steps)
    assert covered == list(range(len(covered)))


def test_a_paused_task_fires_no_more_and_a_resumed_one_goes_on_its_grid(ledger: Ledger) -> None:
    """Another process pauses: nothing after that moment; it resumes: the next instant of the same grid."""
    task = interval("paused")
    first = task.next_run_at
    assert first is not None
    runs_of(ledger, task, 2)

    task.pause_sync()
    paused = len(runs_of(ledger, task))
    other = interval("meanwhile")
    runs_of(ledger, other, 3)
    assert len(runs_of(ledger, task)) == paused

    task.resume_sync()
    resumed = runs_of(ledger, task, paused + 1)[paused]
    task.cancel_sync()
    other.cancel_sync()
    assert ((resumed.scheduled_for or first) - first) % HALF == timedelta()
    assert resumed.stands_for == 1


def test_cron_goes_on_in_the_schedules_zone(ledger: Ledger) -> None:
    """After a firing the next run is the expression's next instant on the clocks of its zone."""
    task = Task(func_name="work", schedule="30 9 * * *", timezone="Asia/Kathmandu", name="cron").save_sync()
    moment = make_due(task)

    assert runs_of(ledger, task, 1)[0].scheduled_for == moment

    following = Task.get_sync("cron").next_run_at
    assert following == Cron("30 9 * * *", "Asia/Kathmandu").next_after(soon())
    assert following is not None
    assert (following.hour, following.minute) == (3, 45)


def test_a_schedule_past_its_end_is_completed(ledger: Ledger) -> None:
    """No run after ``ends_at``."""
    task = interval("ending", ends_at=soon(1.3))

    wait_until(lambda: Task.get_sync("ending").state is ScheduleState.COMPLETED, 30)

    assert Task.get_sync("ending").reason == "it reached its end"
    assert task.ends_at is not None
    assert all((run.scheduled_for or soon()) <= task.ends_at for run in runs_of(ledger, task, 1))


def test_bad_rows_are_set_aside_with_their_reason_and_the_others_go_on(ledger: Ledger) -> None:
    """A function that is gone, a zone nobody knows, a trigger that cannot be read: each stops only itself."""
    gone = put(name="gone", func_name="removed", anchor=soon())
    zone = put(name="zone", func_name="work", kind="cron", expression="* * * * *", timezone="Mars/Olympus")
    unreadable = put(name="unreadable", func_name="work", kind="lunar")
    good = one_off("good", soon(0.2))

    ledger.ends(runs_of(ledger, good, 1)[0].id)
    rows = {name: read(name) for name in (gone, zone, unreadable)}

    assert "no task function is registered as 'removed'" in (rows["gone"].reason or "")
    assert "no IANA zone" in (rows["zone"].reason or "")
    assert "no readable trigger" in (rows["unreadable"].reason or "")
    for row in rows.values():
        assert (row.state, row.next_run_at) == (ScheduleState.ACTIVE, None)
        assert (row.reason or "").startswith("set aside: ")
    assert Task.get_sync("gone").cancel_sync().state is ScheduleState.CANCELLED


def test_declared_schedules_run(ledger: Ledger) -> None:
    """A function registered with an interval runs by itself, and so will the purge."""
    declared = until_declared("often", "llmtasks.purge")

    runs = runs_of(ledger, declared["often"], 2)

    assert ledger.ends(runs[0].id).state is RunState.SUCCEEDED
    assert declared["llmtasks.purge"].schedule == "17 3 * * *"
    assert declared["llmtasks.purge"].state is ScheduleState.ACTIVE


def test_the_built_in_purge_deletes_old_ends_and_no_live_run(project: Project, ledger: Ledger) -> None:
    """Run by hand: what ended long ago goes, what is pending and old stays."""
    old = ledger.ends(one_off_run(ledger, "old").id)
    live = one_off_run(ledger, "live", queue="nobody-listens")
    age(ledger, old.id, live.id)

    ledger.ends(until_declared("llmtasks.purge")["llmtasks.purge"].execute_now_sync().id)

    assert ledger.run(old.id) is None
    kept = ledger.run(live.id)
    assert kept is not None
    assert kept.state is RunState.QUEUED


def one_off_run(ledger: Ledger, key: str, **options: Any) -> Run:
    run = (
        Task(func_name="work", name=key, params={"key": key}, scheduled_at=soon(3600), **options)
        .save_sync()
        .execute_now_sync()
    )
    return ledger.becomes(run.id, RunState.QUEUED, RunState.SUCCEEDED)


def age(ledger: Ledger, *ids: str) -> None:
    from sqlalchemy import update

    from llmtasks.store.rows import runs

    long_ago = soon() - timedelta(days=31)
    with ledger.database.transaction() as tx:
        tx.execute(update(runs).where(runs.c.id.in_(ids)).values(created_at=long_ago))
        tx.execute(update(runs).where(runs.c.id.in_(ids), runs.c.ended_at.is_not(None)).values(ended_at=long_ago))


def test_the_banner_says_which_database_beat_reads(project: Project) -> None:
    """``celery beat`` shows our scheduler and its database; nobody's password."""
    banner = next(process for process in project._processes if process.name == "beat-1").log()

    assert "llmtasks.beat.scheduler.ScheduleBeat" in banner
    assert f". db -> {project.database_url}" in banner


def test_sigterm_ends_a_beat_in_order(project: Project) -> None:
    """It exits with 0, and its row is gone at once, so that what only it declared can be completed."""
    second = project.beat()
    wait_until(lambda: len(alive_beats()) == 2, 30, "two beats are known")

    assert second.terminate() == 0

    assert len(alive_beats()) == 1
    assert "Traceback" not in second.log()


def alive_beats() -> list[processes.Process]:
    with station().database.reading() as connection:
        return processes.alive(connection, station().name, soon(-60), kind="beat")


# -- beats that die


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Project]:
    """A project of the test's own, whose lost workers and messages are noticed soon."""
    with project_with(tmp_path, TASKS, **QUICK) as project:
        assert project.app
        yield project


@pytest.mark.fault
def test_a_beat_killed_in_the_middle_of_a_burst_loses_and_doubles_nothing(fresh: Project) -> None:
    """kill -9 while 600 one-offs are being dispatched: the next beat does the rest, each runs once."""
    ledger = Ledger(fresh)
    due = soon(6)
    with station().database.transaction() as tx:
        rows = [
            Schedule(
                id=f"burst-{number}",
                app=station().name,
                name=f"burst-{number}",
                func_name="work",
                kwargs={"key": "burst"},
                next_run_at=due,
                **{**trigger_columns(Interval(HALF, due)), "kind": "once", "every_us": None},
            )
            for number in range(600)
        ]
        schedules.put_many(tx, rows, soon())
    beat = fresh.beat()
    wait_until(lambda: len(ledger.all("work")) > 0, 60, "the burst has begun", interval=0.002)
    beat.kill()
    fresh.worker(concurrency=4)
    beat.restart()

    wait_until(lambda: ended(ledger) == 600, 90, "all have run")

    assert Counter(run.schedule_id for run in ledger.all("work")) == {row.id: 1 for row in rows}
    assert len(ledger.notes_now("burst")) == 600


def ended(ledger: Ledger) -> int:
    return sum(run.state is RunState.SUCCEEDED for run in ledger.all("work"))


@pytest.mark.fault
def test_two_beats_one_of_which_is_killed_give_each_instant_one_run(fresh: Project) -> None:
    """Side by side nothing is doubled; when one dies the other goes on without a gap."""
    ledger = Ledger(fresh)
    tasks = [interval(f"pair-{number}") for number in range(20)]
    first, second = fresh.beat(), fresh.beat()
    for task in tasks:
        runs_of(ledger, task, 3)
    first.kill()
    counts = {task.id: len(runs_of(ledger, task)) for task in tasks}
    for task in tasks:
        runs_of(ledger, task, counts[task.id] + 3)
    second.terminate()

    for task in tasks:
        assert covers_its_grid(task, runs_of(ledger, task))


def covers_its_grid(task: Task, runs: list[Run]) -> bool:
    """Whether the runs stand for each instant from the Task's first to the latest, each exactly once."""
    first = task.next_run_at
    assert first is not None
    covered: list[int] = []
    for run in runs:
        assert run.scheduled_for is not None
        step = round((run.scheduled_for - first) / HALF)
        covered += range(step + 1 - run.stands_for, step + 1)
    return covered == list(range(len(covered)))


@pytest.mark.fault
def test_misfire_policies_after_beat_was_down(fresh: Project) -> None:
    """``once`` runs the latest for all of them, ``skip`` none, ``all`` each; the ledger shows what was missed."""
    ledger = Ledger(fresh)
    tasks = {policy: interval(policy, misfire=policy, misfire_grace=0.6) for policy in ("once", "skip", "all")}
    late = one_off("late", soon(1), misfire="skip", misfire_grace=0.6)
    wait_until(lambda: soon() > (late.scheduled_at or soon()) + timedelta(seconds=1.5), 30)

    beat = fresh.beat()
    wait_until(lambda: all(len(runs_of(ledger, task)) >= 2 for task in tasks.values()), 60, "all fire again")
    beat.kill()

    once, skip, each = (runs_of(ledger, tasks[policy]) for policy in ("once", "skip", "all"))
    assert once[0].stands_for >= 4
    assert once[0].reason == f"stands for {once[0].stands_for} instants that nobody could dispatch in time"
    assert (skip[0].state, skip[0].delivered) == (RunState.SKIPPED, True)
    assert skip[0].stands_for >= 3
    assert (skip[0].reason or "").startswith(f"misfire policy skip: {skip[0].stands_for} instants missed")
    assert len(each) >= 4
    assert {run.stands_for for run in each} == {1}
    assert "late" in (each[0].reason or "")
    for task, runs in zip(tasks.values(), (once, skip, each), strict=True):
        assert covers_its_grid(task, runs)
    assert runs_of(ledger, late)[0].state is RunState.SKIPPED
    assert (Task.get_sync("late").state, Task.get_sync("late").reason) == ("completed", "its instant was missed")


@pytest.mark.fault
def pings(project: Project) -> dict[str, Any]:
    """What beats answer to ``celery inspect ping``."""
    with project.app.connection_for_write() as connection:
        inspect = project.app.control.inspect(
            timeout=1.0, connection=connection, pattern="celerybeat@*", matcher="glob"
        )
        answers: dict[str, Any] = inspect.ping() or {}
    return answers


@pytest.mark.fault
def test_beat_outlives_the_broker_and_sends_afterwards(tmp_path: Path) -> None:
    """Without a broker beat records what is due; when it is back all of it runs, each once, and beat answers pings."""
    with valkey(tmp_path / "broker", unix=True) as broker:
        project = Project(tmp_path / "project", broker=broker, database_url=f"sqlite:///{tmp_path / 'ledger.db'}")
        try:
            project.tasks(TASKS)
            project.environ.update(QUICK)
            assert project.app
            ledger, beat = Ledger(project), project.beat()
            until_declared("often")
            wait_until(lambda: pings(project), 30, "beat to answer")
            before = len(beat.log().splitlines())
            broker.kill()
            tasks = [one_off(f"away-{number}", soon(0.1)) for number in range(5)]
            runs = [runs_of(ledger, task, 1)[0] for task in tasks]
            assert {run.state for run in runs} == {RunState.PENDING}
            beat.wait_for_log("messages wait in the outbox")

            broker.start()
            project.worker()

            assert {ledger.ends(run.id).state for run in runs} == {RunState.SUCCEEDED}
            assert sum(len(ledger.notes_now(f"away-{number}")) for number in range(5)) == 5
            assert beat.running
            assert "Traceback" not in beat.log()
            assert len(beat.log().splitlines()) <= before + 20
            answers = wait_until(lambda: pings(project), 30, "beat to answer again")
            assert list(answers.values()) == [{"ok": "pong"}]
        finally:
            project.close()


@pytest.mark.fault
def test_beat_outlives_the_database_and_goes_on_when_it_returns(
    tmp_path: Path, own_server: DatabaseServer, valkey_server: Valkey
) -> None:
    """The server is killed: beat says so once, lives, and fires within seconds of its return."""
    project = project_on(own_server, tmp_path, valkey_server)
    try:
        ledger, beat = Ledger(project), project.beat()
        task = interval("survives")
        before = len(runs_of(ledger, task, 2))

        own_server.kill()
        beat.wait_for_log("beat waits for the database")
        own_server.start()
        back = time.monotonic()
        station().database.close()
        wait_until(lambda: recovered(ledger, task, before), 60, "it fires again")

        assert time.monotonic() - back < 20
        assert beat.running
        assert covers_its_grid(task, runs_of(ledger, task))
        assert beat.log().count("beat waits for the database") == 1
        assert "Traceback" not in beat.log()
    finally:
        project.close()


def project_on(server: DatabaseServer, folder: Path, broker: Valkey) -> Project:
    project = Project(folder / "project", broker=broker, database_url=server.create_database())
    project.tasks(TASKS)
    assert project.app
    station().database.migrate()
    return project


def recovered(ledger: Ledger, task: Task, before: int) -> bool:
    from llmtasks.errors import DatabaseUnavailableError

    try:
        return len(runs_of(ledger, task)) > before + 1
    except DatabaseUnavailableError:
        return False


def test_a_pause_while_beat_writes_what_code_declares_is_kept(
    tmp_path: Path, database_server: DatabaseServer, valkey_server: Valkey
) -> None:
    """Beat has read the rows, and somebody pauses one of them before it writes: both changes are there afterwards."""
    project = project_on(database_server, tmp_path, valkey_server)
    try:
        at = station()
        declared = [item for item in sync.declared_of(at) if item.name == "often"]
        sync.write(at, declared)
        changed = [replace(item, kwargs={"key": "changed"}) for item in declared]
        with ThreadPoolExecutor(1) as pool:
            with at.database.transaction() as tx:
                (row,) = schedules.find(tx, at.name, name="often")
                schedules.put(tx, replace(row, state=ScheduleState.PAUSED, next_run_at=None), soon())
                written = pool.submit(sync.write, at, changed)
                # MariaDB looks again only when it was not asked for a tenth of a second.
                wait_until(lambda: waits_for_a_lock(at), 30, "beat waits for the row", interval=0.2)
            written.result(30)

        assert (read(row.id).state, read(row.id).kwargs) == (ScheduleState.PAUSED, {"key": "changed"})
        assert read(row.id).next_run_at is None
    finally:
        project.close()


def waits_for_a_lock(at: Station) -> bool:
    waiting = {
        "postgresql": "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
        "mysql": "SELECT 1 FROM information_schema.innodb_trx JOIN information_schema.processlist"
        " ON id = trx_mysql_thread_id WHERE db = database() AND trx_state = 'LOCK WAIT'",
    }
    with at.database.reading() as connection:
        return connection.execute(text(waiting[connection.dialect.name])).first() is not None


def test_beats_that_start_together_on_a_server_declare_each_schedule_once(
    tmp_path: Path, database_server: DatabaseServer, valkey_server: Valkey
) -> None:
    """Both write the same rows at the same moment: no error, no double, and each instant one run."""
    project = project_on(database_server, tmp_path, valkey_server)
    try:
        ledger = Ledger(project)
        beats = [project.beat(), project.beat()]
        often = until_declared("often", "llmtasks.purge")["often"]
        runs = runs_of(ledger, often, 4)

        assert [task.name for task in Task.list_sync()] == ["llmtasks.purge", "often"]
        assert len({run.scheduled_for for run in runs}) == len(runs)
        assert not any("Traceback" in beat.log() for beat in beats)
    finally:
        project.close()


# -- what code declares

FIRST = """
    from llmtasks import task_registry

    @task_registry.register(name="same", schedule="0 5 * * *", timezone="Europe/Berlin")
    def same(): ...

    @task_registry.register(name="steady", interval_minutes=600)
    def steady(): ...

    @task_registry.register(name="changed", interval_minutes=60)
    def changed(): ...

    @task_registry.register(name="removed", interval_minutes=60)
    def removed(): ...

    @task_registry.register(name="paused", interval_minutes=60)
    def paused(): ...
"""
SECOND = FIRST.replace('name="changed", interval_minutes=60', 'name="changed", schedule="@daily"').replace(
    'name="removed", interval_minutes=60', 'name="added", interval_minutes=60'
)


def test_a_redeploy_changes_what_the_code_changed_and_nothing_else(tmp_path: Path) -> None:
    """Unchanged ones keep their next run, changed ones move, removed ones complete, a pause survives."""
    with project_with(tmp_path, FIRST, **QUICK) as project:
        assert project.app
        beat = project.beat()
        before = until_declared("same", "steady", "changed", "removed", "paused")
        before["paused"].pause_sync(by="alice")
        beat.terminate()

        project.tasks(SECOND)
        beat.restart()
        wait_until(lambda: Task.get_sync("removed").state is ScheduleState.COMPLETED, 60, "the removed one completes")
        after = until_declared("added")

        for name in ("same", "steady"):
            assert (after[name].id, after[name].next_run_at) == (before[name].id, before[name].next_run_at)
        assert after["same"].timezone == "Europe/Berlin"
        assert (after["changed"].schedule, after["changed"].interval_minutes) == ("@daily", None)
        assert after["changed"].next_run_at != before["changed"].next_run_at
        assert after["removed"].reason == "removed from code"
        assert (after["paused"].state, after["paused"].next_run_at) == (ScheduleState.PAUSED, None)
        assert (after["paused"].reason, after["paused"].paused_at) == ("paused by alice", before["paused"].paused_at)

        beat.terminate()
        project.tasks(FIRST)
        beat.restart()
        wait_until(lambda: Task.get_sync("removed").state is ScheduleState.ACTIVE, 60, "it is declared again")
        assert Task.get_sync("removed").next_run_at is not None


def test_what_another_live_beat_declares_is_not_completed(tmp_path: Path) -> None:
    """During a rolling update old and new beats run side by side."""
    with project_with(tmp_path, FIRST, **QUICK) as project:
        assert project.app
        old = project.beat()
        until_declared("removed")
        project.tasks(SECOND)
        new = project.beat()
        until_declared("added")
        new.wait_for_log("schedules are declared in code")
        assert Task.get_sync("removed").state is ScheduleState.ACTIVE

        old.kill()

        wait_until(
            lambda: Task.get_sync("removed").state is ScheduleState.COMPLETED, 60, "only the dead one declared it"
        )
        assert Task.get_sync("added").state is ScheduleState.ACTIVE


# -- an existing Celery app

EXISTING = """
    from datetime import timedelta

    from celery import Celery
    from celery.schedules import crontab

    import llmtasks
    from tests.notebook import note

    app = Celery("shop", broker={broker!r}, backend="db+sqlite:///results.db")
    app.conf.beat_schedule = {{
        "plain entry": {{"task": "plain", "schedule": 0.5, "args": ("entry",), "options": {{"queue": "special"}}}},
        "registered entry": {{
            "task": "registered", "schedule": timedelta(seconds=0.5), "kwargs": {{"key": "entry"}},
            "options": {{"overlap": "allow"}},
        }},
        "nightly": {{"task": "plain", "schedule": crontab(minute="*/15", hour={{1, 2}}, day_of_week="mon-fri")}},
        "first monday": {{"task": "plain", "schedule": crontab(0, 9, day_of_week="monday", day_of_month="1-7")}},
        "impossible": {{"task": "plain", "schedule": crontab(0, 9, day_of_week="monday", day_of_month="8-14")}},
        "never": {{"task": "plain", "schedule": 0}},
    }}
    llmtasks.install(app)


    @app.task(name="plain")
    def plain(key="plain"):
        note("plain-" + key, "ran")


    @llmtasks.task_registry.register(name="registered")
    async def registered(key: str):
        note("registered-" + key, "ran")


    @app.on_after_finalize.connect
    def add(sender, **_):
        sender.add_periodic_task(0.5, plain.s("added"))
        sender.add_periodic_task(crontab(minute=0), registered.s(key="added"), name="hourly")
"""


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Project]:
    """An app of its own, with its own tasks and entries, after ``llmtasks.install(app)``."""
    with valkey(tmp_path / "broker", unix=True) as broker:
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        project = Project(tmp_path / "project", broker=broker, database_url=url, celeryconfig="")
        project.environ["APP"] = "shop"  # as `celery -A shop`
        for name in ("LLMTASKS_BROKER_URL", "LLMTASKS_RESULT_URL"):
            del project.environ[name]
        project.write("shop.py", EXISTING.format(broker=broker.url))
        yield project
        project.close()


def shop_schedules(project: Project) -> dict[str, dict[str, Any]]:
    """The app's schedules as another of its processes reads them."""
    import json

    printed = project.python(
        """
        import json
        from shop import app
        app.set_default()
        from llmtasks import Task
        print(json.dumps({task.name: {
            "schedule": task.schedule, "timezone": task.timezone, "minutes": task.interval_minutes,
            "state": task.state, "handed": task._row.handed, "queue": task.queue, "id": task.id,
        } for task in Task.list_sync()}))
        """
    )
    return dict(json.loads(printed))


def test_the_entries_of_an_existing_app_become_schedules(shop: Project) -> None:
    """beat_schedule and add_periodic_task, crontab and numbers, registered and plain tasks, Celery's own cleanup."""
    beat = shop.beat()
    shop.worker("-Q", "celery,special")
    ledger = Ledger(shop)
    for name in ("plain-entry", "plain-added", "registered-entry"):
        ledger.notes(name, 2)

    found = shop_schedules(shop)

    assert found["plain entry"] | {"id": None} == {
        "schedule": None, "timezone": None, "minutes": 0.5 / 60, "state": "active", "handed": True,
        "queue": "special", "id": None,
    }  # fmt: skip
    assert (found["registered entry"]["handed"], found["hourly"]["handed"]) == (False, False)
    assert (found["hourly"]["schedule"], found["hourly"]["timezone"]) == ("0 * * * *", "UTC")
    assert found["nightly"]["schedule"] == "*/15 1,2 * * 1,2,3,4,5"
    assert found["first monday"]["schedule"] == "0 9 */31,1,2,3,4,5,6,7 * 1"
    assert (found["celery.backend_cleanup"]["schedule"], found["celery.backend_cleanup"]["handed"]) == (
        "0 4 * * *",
        True,
    )
    assert "shop.plain('added')" in found or "plain('added')" in found
    assert "impossible" not in found
    assert "never" not in found
    beat.wait_for_log("beat_schedule entry 'impossible' is left out: <crontab")
    beat.wait_for_log("beat_schedule entry 'never' is left out: every=")


def test_runs_of_plain_tasks_end_when_they_are_handed_to_celery(shop: Project) -> None:
    """The ledger says so, nobody claims or republishes them; runs of registered functions end as usual."""
    shop.beat()
    shop.worker("-Q", "celery,special")
    Ledger(shop).notes("plain-entry", 3)
    Ledger(shop).notes("registered-entry", 3)

    ended = shop.python(
        """
        from shop import app
        app.set_default()
        from llmtasks.dispatch import station
        from llmtasks.store import runs
        with station().database.reading() as connection:
            found = runs.find(connection, "shop", limit=10_000)
        # Between its end and the telling a run of a registered function is not delivered yet.
        ended = [run for run in found if run.state.is_final and (run.delivered or run.func_name == "plain")]
        print(sorted({(run.func_name, str(run.state), run.reason, run.delivered) for run in ended}))
        """
    )

    assert ended == ("[('plain', 'skipped', 'handed to Celery', True), ('registered', 'succeeded', None, True)]\n")


# -- beat inside a worker


def test_beat_inside_a_worker(tmp_path: Path) -> None:
    """``celery worker -B`` runs the schedules too."""
    with project_with(tmp_path, TASKS, **QUICK) as project:
        assert project.app
        worker = project.worker("-B")
        ledger = Ledger(project)

        ledger.notes("often", 2)
        task = one_off("embedded", soon(0.3))
        assert ledger.ends(runs_of(ledger, task, 1)[0].id).state is RunState.SUCCEEDED

        assert worker.terminate() == 0
        assert "Traceback" not in worker.log()
