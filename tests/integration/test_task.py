"""Task against a real database: what is stored, what is refused, and who owns what afterwards. No worker, no beat."""

import time
import uuid
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import time_machine
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from llmtasks import Task
from llmtasks.dispatch import station
from llmtasks.errors import (
    ConfigurationError,
    ForbiddenTransitionError,
    InvalidOptionError,
    InvalidParamsError,
    InvalidTriggerError,
    LLMTasksError,
    TaskNotFoundError,
    UnknownTaskFunctionError,
)
from llmtasks.states import RunState, ScheduleState
from llmtasks.store import rows, runs, schedules
from tests.conftest import on
from tests.processes import Project
from tests.servers import Valkey

TASKS = """
    from llmtasks import task_registry

    @task_registry.register(name="process_document")
    async def process_document(doc_id: str, *, pages: int = 1):
        return doc_id

    @task_registry.register(name="sync_emails")
    def sync_emails():
        return None

    @task_registry.register(name="anything", bind=True)
    def anything(self, **values):
        return None
"""
HOUR = timedelta(hours=1)

pytestmark = pytest.mark.redis


@pytest.fixture
def project(tmp_path: Path, valkey_server: Valkey, database_url: str) -> Iterator[Project]:
    """A project whose processes are only this one."""
    project = Project(tmp_path / "project", broker=valkey_server, database_url=database_url)
    project.tasks(TASKS)
    assert project.app
    station().database.migrate()
    yield project
    project.close()


@pytest.fixture
def on_sqlite(tmp_path: Path, valkey_server: Valkey) -> Iterator[Project]:
    """The same for what does not depend on the database."""
    project = Project(tmp_path / "project", broker=valkey_server, database_url=f"sqlite:///{tmp_path / 'tasks.db'}")
    project.tasks(TASKS)
    assert project.app
    yield project
    project.close()


def every(minutes: float = 30, **values: Any) -> Task:
    return Task(func_name="sync_emails", interval_minutes=minutes, **values)


def stored() -> list[Task]:
    return Task.list_sync()


def seconds_from_now(instant: datetime | None) -> float:
    assert instant is not None
    return (instant - datetime.now(UTC)).total_seconds()


# -- save


async def test_save_stores_what_another_process_reads(project: Project) -> None:
    """Everything that a Task says comes back by ``get``, by id and by name."""
    task = Task(
        name="nightly import",
        func_name="process_document",
        params={"doc_id": "123", "pages": 4},
        schedule="30 2 * * 1-5",
        timezone="Asia/Shanghai",
        priority=1,
        timeout=90,
        max_retries=5,
        max_instances=2,
        queue="slow",
        misfire="all",
        misfire_grace=5,
        ends_at=datetime(2999, 1, 1, tzinfo=UTC),
    )
    assert await task.save() is task
    assert task.id is not None

    for key in (task.id, "nightly import"):
        found = await Task.get(key)
        for name in (
            "id", "name", "func_name", "params", "schedule", "timezone", "priority", "timeout", "max_retries",
            "max_instances", "queue", "misfire", "misfire_grace", "ends_at", "state", "next_run_at", "created_at",
        ):  # fmt: skip
            assert getattr(found, name) == getattr(task, name), name
    assert task.state is ScheduleState.ACTIVE
    assert task.next_run_at is not None
    assert (task.next_run_at.hour, task.next_run_at.minute, task.next_run_at.tzinfo) == (18, 30, UTC)


def test_the_name_defaults_to_the_functions(project: Project) -> None:
    """A Task without a name is called as its function."""
    assert every().save_sync().name == "sync_emails"


def test_first_run_of_an_interval_is_one_interval_after_the_save(project: Project) -> None:
    """Nothing runs at once unless ``next_run_at`` says so."""
    task = every(30).save_sync()

    assert seconds_from_now(task.next_run_at) == pytest.approx(1800, abs=20)
    assert task.next_runs(3) == [task.next_run_at + step * HOUR / 2 for step in range(3)]  # type: ignore[operator]


def test_next_run_at_begins_the_grid(project: Project) -> None:
    """The first run is when it was asked for, the others follow from there."""
    first = datetime.now(UTC) + timedelta(days=1)

    task = every(30, next_run_at=first).save_sync()

    assert task.next_runs(2) == [first, first + HOUR / 2]


def test_next_run_at_in_the_past_means_now(project: Project) -> None:
    """The seed's ``next_run_at=datetime.now()`` runs at once."""
    task = every(30, next_run_at=datetime.now() - timedelta(days=3)).save_sync()

    assert seconds_from_now(task.next_run_at) == pytest.approx(0, abs=20)


def test_naive_datetimes_are_the_machines_local_time(on_sqlite: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datetime.now() + 1 h`` is in an hour wherever the machine is; what comes back is aware and UTC."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        task = Task(func_name="sync_emails", scheduled_at=datetime.now() + HOUR).save_sync()
        assert seconds_from_now(task.next_run_at) == pytest.approx(3600, abs=20)
        assert task.next_run_at is not None
        assert task.next_run_at.tzinfo is UTC
    finally:
        monkeypatch.undo()
        time.tzset()


def test_params_keep_dates_and_decimals(project: Project) -> None:
    """What Celery's JSON carries beyond plain JSON comes back as it was."""
    params = {"when": datetime(2026, 1, 2, 3, 4, tzinfo=UTC), "day": date(2026, 1, 2), "id": uuid.uuid4()}
    params |= {"price": Decimal("1.10"), "nested": {"list": [1, 2.5, None, True, "é"]}}  # type: ignore[dict-item]

    task = Task(func_name="anything", params=params, interval_minutes=5).save_sync()

    assert Task.get_sync(task.id or "").params == params


def test_second_save_keeps_the_next_run_where_the_trigger_is_the_same(project: Project) -> None:
    """Changing anything else does not move it; a row is not doubled."""
    task = every(30).save_sync()
    first = task.next_run_at

    task.priority = 2
    task.name = "renamed"
    task.save_sync()

    assert [(found.id, found.name, found.priority, found.next_run_at) for found in stored()] == [
        (task.id, "renamed", 2, first)
    ]


def test_second_save_moves_the_next_run_where_the_trigger_changed(project: Project) -> None:
    """From 30 to 5 minutes: the next run is in 5."""
    task = every(30).save_sync()

    task.interval_minutes = 5
    task.save_sync()

    assert seconds_from_now(task.next_run_at) == pytest.approx(300, abs=20)


def test_second_save_may_change_the_kind_of_trigger(project: Project) -> None:
    """A cron schedule becomes an interval, without its zone getting in the way."""
    task = Task(func_name="sync_emails", schedule="0 3 * * *", timezone="Asia/Tokyo").save_sync()

    task.schedule, task.interval_minutes = None, 10
    task.save_sync()

    found = Task.get_sync(task.id or "")
    assert (found.schedule, found.timezone, found.interval_minutes) == (None, None, 10)


def test_second_save_moves_the_next_run_that_was_set(project: Project) -> None:
    """``next_run_at`` set anew begins a new grid on the same interval."""
    task = every(30).save_sync()
    wanted = datetime.now(UTC) + timedelta(days=2)

    task.next_run_at = wanted
    task.save_sync()

    assert task.next_runs(2) == [wanted, wanted + HOUR / 2]


def test_save_of_a_stale_handle_does_not_move_what_beat_moved(project: Project) -> None:
    """A handle read before a firing knows an old next run; saving it writes what changed, not that."""
    task = every(30).save_sync()
    database, later = station().database, datetime.now(UTC) + timedelta(days=9)
    with database.transaction() as tx:
        move = schedules.Advance(
            schedule_id=task.id or "", next_at=later, last_at=None, to=ScheduleState.ACTIVE, why=None
        )
        schedules.advance(tx, [move])

    task.priority = 3
    task.save_sync()

    assert Task.get_sync(task.id or "").next_run_at == later


def test_save_of_a_paused_task_leaves_it_paused(project: Project) -> None:
    """Changing a paused Task does not start it."""
    task = every(30).save_sync().pause_sync()

    task.interval_minutes = 5
    task.save_sync()

    assert (task.state, task.next_run_at) == (ScheduleState.PAUSED, None)


def test_a_task_that_was_set_aside_begins_again_when_it_is_saved(project: Project) -> None:
    """Beat sets a row that it cannot run aside; saving or resuming takes it back."""
    for again in (Task.save_sync, Task.resume_sync):
        task = every(30).save_sync()
        with station().database.transaction() as tx:
            aside = schedules.Advance(
                schedule_id=task.id or "", next_at=None, last_at=None, to=ScheduleState.ACTIVE, why="set aside: gone"
            )
            schedules.advance(tx, [aside])
        found = Task.get_sync(task.id or "")
        assert (found.next_run_at, found.reason) == (None, "set aside: gone")

        again(found)

        assert found.next_run_at is not None
        assert found.reason is None


def test_a_completed_one_off_begins_again_with_a_new_instant(project: Project) -> None:
    """The same handle may be used for another time."""
    task = Task(func_name="sync_emails", scheduled_at=datetime.now(UTC) + HOUR).save_sync()
    with station().database.transaction() as tx:
        done = schedules.Advance(
            schedule_id=task.id or "", next_at=None, last_at=None, to=ScheduleState.COMPLETED, why="it fired"
        )
        schedules.advance(tx, [done])

    task.scheduled_at = datetime.now(UTC) + 2 * HOUR
    task.save_sync()

    assert (task.state, task.reason) == (ScheduleState.ACTIVE, None)
    assert seconds_from_now(task.next_run_at) == pytest.approx(7200, abs=20)


def test_a_cancelled_task_is_not_saved_again(project: Project) -> None:
    """Cancelled is for good; the error says what to do."""
    task = every().save_sync().cancel_sync()

    with pytest.raises(ForbiddenTransitionError, match="save a new Task"):
        task.save_sync()


# -- bad input

BAD: list[tuple[dict[str, Any], type[LLMTasksError], str]] = [
    (
        {"func_name": "process_documnet", "interval_minutes": 5},
        UnknownTaskFunctionError,
        "did you mean 'process_document'",
    ),
    ({"func_name": None, "interval_minutes": 5}, InvalidOptionError, "func_name=None: expected a text"),
    ({"name": "", "interval_minutes": 5}, InvalidOptionError, "name='': expected a text of 1 to 200"),
    ({"name": "x" * 201, "interval_minutes": 5}, InvalidOptionError, "expected a text of 1 to 200 characters"),
    (
        {"func_name": "process_document", "interval_minutes": 5},
        InvalidParamsError,
        "missing a required argument: 'doc_id'",
    ),
    ({"params": {"doc": 1}, "interval_minutes": 5}, InvalidParamsError, "unexpected keyword argument 'doc'"),
    ({"params": ["a"], "interval_minutes": 5}, InvalidParamsError, "expected a dict"),
    ({"params": {1: "a"}, "interval_minutes": 5}, InvalidParamsError, "expected a dict"),
    (
        {"func_name": "anything", "params": {"a": [{"b": object()}]}, "interval_minutes": 5},
        InvalidParamsError,
        r"params\['a'\]\[0\]\['b'\] is <object",
    ),
    ({}, InvalidTriggerError, "has no trigger: expected exactly one of scheduled_at, interval_minutes, schedule"),
    ({"interval_minutes": 5, "schedule": "* * * * *"}, InvalidTriggerError, "interval_minutes and schedule"),
    ({"scheduled_at": datetime(2999, 1, 1), "interval_minutes": 5}, InvalidTriggerError, "scheduled_at and interval"),
    ({"scheduled_at": datetime.now() - HOUR}, InvalidTriggerError, "an instant after now"),
    ({"scheduled_at": "tomorrow"}, InvalidTriggerError, "scheduled_at='tomorrow': expected a datetime"),
    ({"scheduled_at": datetime(2999, 1, 1), "next_run_at": datetime.now()}, InvalidTriggerError, "next_run_at="),
    ({"schedule": "* * * * *", "next_run_at": datetime.now()}, InvalidTriggerError, "only together with interval"),
    ({"interval_minutes": 5, "next_run_at": 17}, InvalidTriggerError, "next_run_at=17: expected a datetime"),
    ({"interval_minutes": 5, "ends_at": "never"}, InvalidTriggerError, "ends_at='never': expected a datetime"),
    ({"interval_minutes": 5, "ends_at": datetime.now()}, InvalidTriggerError, "ends_at=.*not before the next run"),
    ({"interval_minutes": 0}, InvalidOptionError, "interval_minutes=0: expected a number above 0"),
    ({"interval_minutes": -1}, InvalidOptionError, "a number above 0"),
    ({"interval_minutes": "5"}, InvalidOptionError, "a number above 0"),
    ({"interval_minutes": float("nan")}, InvalidOptionError, "a number above 0"),
    ({"interval_minutes": 1e300}, InvalidTriggerError, "at most a hundred years"),
    ({"interval_minutes": 1e-12}, InvalidTriggerError, "more than 0"),
    ({"schedule": "61 * * * *"}, InvalidTriggerError, r"bad minute \(field 1\) '61'.*0-59"),
    ({"schedule": "* * 31 2 *"}, InvalidTriggerError, "it never fires"),
    ({"schedule": "@dayly"}, InvalidTriggerError, "did you mean '@daily'"),
    ({"schedule": 5}, InvalidTriggerError, "expected five fields"),
    ({"schedule": "0 0 * * *", "timezone": "Europe/Berln"}, InvalidTriggerError, "did you mean 'Europe/Berlin'"),
    ({"schedule": "0 0 * * *", "timezone": 1}, InvalidOptionError, "the name of a zone"),
    ({"interval_minutes": 5, "timezone": "UTC"}, InvalidTriggerError, "only together with schedule"),
    ({"interval_minutes": 5, "priority": 0}, InvalidOptionError, "a whole number from 1 to 10. 1 runs first"),
    ({"interval_minutes": 5, "priority": 11}, InvalidOptionError, "1 to 10"),
    ({"interval_minutes": 5, "priority": True}, InvalidOptionError, "1 to 10"),
    ({"interval_minutes": 5, "timeout": 0}, InvalidOptionError, "timeout=0"),
    ({"interval_minutes": 5, "max_retries": -1}, InvalidOptionError, "max_retries=-1"),
    ({"interval_minutes": 5, "max_instances": 0}, InvalidOptionError, "max_instances=0"),
    ({"interval_minutes": 5, "misfire": "maybe"}, InvalidOptionError, "one of 'once', 'skip', 'all'"),
    ({"interval_minutes": 5, "misfire_grace": -1}, InvalidOptionError, "misfire_grace=-1"),
    ({"interval_minutes": 5, "queue": ""}, InvalidOptionError, "the name of a queue"),
    ({"interval_minutes": 5, "id": "x" * 37}, InvalidOptionError, "1 to 36 characters"),
]


def test_bad_input_is_an_error_at_save_and_stores_nothing(on_sqlite: Project) -> None:
    """Each mistake is named with what was given and what was expected."""
    for values, error, message in BAD:
        task = Task(**{"func_name": "sync_emails", **values})
        with pytest.raises(error, match=message):
            task.save_sync()
        assert task.id is None or task.id == values.get("id")
        assert task.state is None
    assert stored() == []


def test_a_refused_second_save_leaves_the_stored_task_as_it_was(project: Project) -> None:
    """The row keeps its trigger and its next run."""
    task = every(30).save_sync()
    first = task.next_run_at

    task.interval_minutes, task.ends_at = 5, datetime.now(UTC)
    with pytest.raises(InvalidTriggerError, match="ends_at"):
        task.save_sync()

    found = Task.get_sync(task.id or "")
    assert (found.interval_minutes, found.next_run_at, found.ends_at) == (30, first, None)


def test_an_unsaved_task_cannot_be_controlled(on_sqlite: Project) -> None:
    """The error says to save first."""
    for verb in (Task.pause_sync, Task.resume_sync, Task.cancel_sync, Task.execute_now_sync):
        with pytest.raises(ConfigurationError, match="call save"):
            verb(every())


# -- zones


SAVE_CRON = """
    import tasks
    from llmtasks import Task

    found = Task.list_sync(name="cron")
    task = found[0] if found else Task(name="cron", func_name="sync_emails", schedule="0 9 * * *")
    task.priority = 1 + len(found)
    print(task.save_sync().timezone)
"""


def test_a_cron_expression_without_a_zone_has_that_of_the_process_that_saved_it(on_sqlite: Project) -> None:
    """The zone is stored by name, and a later save on a host in another zone does not move it."""
    on_sqlite.environ["TZ"] = "Asia/Tokyo"
    assert on_sqlite.python(SAVE_CRON) == "Asia/Tokyo\n"
    first = Task.get_sync("cron").next_run_at

    on_sqlite.environ["TZ"] = "America/New_York"
    assert on_sqlite.python(SAVE_CRON) == "Asia/Tokyo\n"

    task = Task.get_sync("cron")
    assert (task.priority, task.next_run_at) == (2, first)


def test_the_apps_zone_comes_before_the_machines(
    tmp_path: Path, valkey_server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``timezone`` in Celery's configuration is the zone of expressions that name none."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # nobody has to look at it
    project = Project(tmp_path / "project", broker=valkey_server, database_url=f"sqlite:///{tmp_path / 'tasks.db'}")
    project.write(
        "celeryconfig.py", (project.folder / "celeryconfig.py").read_text() + '\ntimezone = "Europe/Berlin"\n'
    )
    project.tasks(TASKS)
    try:
        assert project.app
        assert Task(func_name="sync_emails", schedule="0 9 * * *").save_sync().timezone == "Europe/Berlin"
        assert Task(func_name="sync_emails", schedule="0 9 * * *", timezone="UTC").save_sync().timezone == "UTC"
    finally:
        project.close()


# -- pause, resume, cancel


async def test_pause_and_resume(project: Project) -> None:
    """A paused Task has no next run; a resumed one goes to its next instant on the grid, never at once."""
    first = datetime.now(UTC) + timedelta(minutes=10)
    task = await every(30, next_run_at=first).save()

    await task.pause()
    assert (task.state, task.next_run_at, (await Task.get(task.id or "")).next_run_at) == ("paused", None, None)
    assert task.next_runs(2) == [first, first + HOUR / 2]
    await task.pause()

    await task.resume()
    assert (task.state, task.next_run_at) == (ScheduleState.ACTIVE, first)


def test_resume_after_missed_instants_goes_to_the_next_one(on_sqlite: Project) -> None:
    """What passed while it was paused does not run."""
    with time_machine.travel(datetime(2026, 3, 2, 12, 0, tzinfo=UTC)) as clock:
        task = every(30).save_sync().pause_sync()
        clock.shift(timedelta(hours=5, minutes=7))

        task.resume_sync()

        assert task.next_run_at is not None
        assert task.next_run_at.replace(microsecond=0, second=0) == datetime(2026, 3, 2, 17, 30, tzinfo=UTC)


def test_resume_of_a_one_off_whose_instant_passed_completes_it(on_sqlite: Project) -> None:
    """There is nothing left to run, and the reason says why."""
    with time_machine.travel(datetime(2026, 3, 2, 12, 0, tzinfo=UTC)) as clock:
        task = Task(func_name="sync_emails", scheduled_at=datetime.now(UTC) + HOUR).save_sync().pause_sync()
        clock.shift(2 * HOUR)

        task.resume_sync()

    assert (task.state, task.reason) == (ScheduleState.COMPLETED, "its last instant passed while it was paused")


async def test_pause_keeps_who_wanted_it_and_since_when(project: Project) -> None:
    """Saving the Task keeps both, cancelling it keeps neither; a name is a text."""
    task = await every().save()

    await task.pause(by="alice")
    since = task.paused_at
    await task.save()

    assert (task.reason, task.paused_at) == ("paused by alice", since)
    assert since is not None
    await task.cancel("not needed")
    assert (task.reason, task.paused_at) == ("not needed", None)
    with pytest.raises(InvalidOptionError, match="by=7: expected a name"):
        await task.pause(by=7)  # type: ignore[arg-type]


async def test_cancel_is_for_good(project: Project) -> None:
    """A cancelled Task is neither paused nor resumed; cancelling it again changes nothing."""
    task = await every().save()

    await task.cancel("not needed")

    assert (task.state, task.next_run_at, task.reason) == (ScheduleState.CANCELLED, None, "not needed")
    for verb in (task.pause, task.resume):
        with pytest.raises(ForbiddenTransitionError, match="is cancelled"):
            await verb()
    assert (await task.cancel("again")).reason == "not needed"


async def test_cancel_ends_the_runs_that_have_not_started(project: Project) -> None:
    """Runs of this Task end as cancelled, runs of others go on."""
    task, other = await every().save(), await every().save()
    mine, theirs = await task.execute_now(), await other.execute_now()

    await task.cancel()

    with station().database.reading() as connection:
        cancelled, alive = runs.get(connection, mine.id), runs.get(connection, theirs.id)
    assert cancelled is not None
    assert alive is not None
    assert (cancelled.state, cancelled.reason) == (RunState.CANCELLED, "its Task was cancelled")
    assert alive.state is RunState.QUEUED


async def test_cancel_run_ends_one_run(project: Project) -> None:
    """One run, and an id that nobody knows yet is remembered."""
    run = await (await every().save()).execute_now()

    cancelled = await Task.cancel_run(run.id, "a mistake")

    assert cancelled is not None
    assert (cancelled.state, cancelled.reason) == (RunState.CANCELLED, "a mistake")
    assert await Task.cancel_run(str(uuid.uuid4())) is None


# -- execute_now


async def test_execute_now_works_in_every_state(project: Project) -> None:
    """Active, paused, completed, cancelled: a run with the Task's arguments, and the schedule does not move."""
    task = await Task(
        func_name="process_document", params={"doc_id": "7"}, interval_minutes=30, priority=2, max_retries=1
    ).save()
    seen = []
    for verb in (None, task.pause, task.resume, task.cancel):
        if verb is not None:
            await verb()
        before = task.next_run_at
        run = await task.execute_now()
        assert (run.func_name, run.kwargs, run.priority, run.max_retries) == ("process_document", {"doc_id": "7"}, 2, 1)
        assert (run.schedule_id, run.scheduled_for) == (task.id, None)
        assert (await Task.get(task.id or "")).next_run_at == before
        seen.append(run.id)

    assert len(set(seen)) == 4


async def test_execute_now_returns_although_the_broker_is_away(tmp_path: Path, broker: Valkey) -> None:
    """The run is recorded and waits in the outbox."""
    project = Project(tmp_path / "project", broker=broker, database_url=f"sqlite:///{tmp_path / 'tasks.db'}")
    project.tasks(TASKS)
    try:
        assert project.app
        task = await every().save()
        broker.kill()

        run = await task.execute_now()

        assert run.state is RunState.PENDING
    finally:
        project.close()


# -- get, list


async def test_get_says_what_is_missing_or_ambiguous(project: Project) -> None:
    """An unknown name, and a name that several share: with their ids."""
    one, other = await every(name="same").save(), await every(name="same").save()

    with pytest.raises(TaskNotFoundError, match="no Task has the id or name 'absent'"):
        await Task.get("absent")
    with pytest.raises(TaskNotFoundError, match="2 Tasks are named 'same'") as ambiguous:
        await Task.get("same")

    assert (one.id or "") in str(ambiguous.value)
    assert (other.id or "") in str(ambiguous.value)


async def test_list_filters_by_name_function_and_state(project: Project) -> None:
    """Filters narrow the list; a wrong state is an error."""
    one = await every(name="one").save()
    two = await (await every(name="two").save()).pause()
    three = await Task(func_name="anything", name="three", interval_minutes=1).save()

    def ids(found: list[Task]) -> set[str | None]:
        return {task.id for task in found}

    assert ids(await Task.list()) == {one.id, two.id, three.id}
    assert ids(await Task.list(name="two")) == {two.id}
    assert ids(await Task.list(func_name="anything")) == {three.id}
    assert ids(await Task.list(states=["paused", ScheduleState.CANCELLED])) == {two.id}
    assert len(await Task.list(limit=1)) == 1
    with pytest.raises(ValueError, match="stopped"):
        await Task.list(states=["stopped"])


def test_a_task_that_is_gone_says_so(project: Project) -> None:
    """A handle whose row was deleted."""
    task = every().save_sync()
    with station().database.transaction() as tx:
        tx.execute(rows.schedules.delete().where(rows.schedules.c.id == task.id))

    with pytest.raises(TaskNotFoundError, match="any more"):
        task.pause_sync()


def test_next_runs_of_a_task_that_is_not_saved(on_sqlite: Project) -> None:
    """A preview, checked as ``save`` checks it."""
    task = Task(func_name="sync_emails", schedule="0 0 1 1 *", timezone="UTC", ends_at=datetime(2029, 6, 1, tzinfo=UTC))
    years = [instant.year for instant in task.next_runs(10)]

    assert years == list(range(datetime.now(UTC).year + 1, 2030))
    assert stored() == []


# -- the caller's own transaction


def test_a_session_of_the_caller_decides_whether_the_task_exists(project: Project) -> None:
    """Commit: it exists. Rollback: it never did, and the handle can be saved again."""
    engine = create_engine(project.database_url)
    try:
        with Session(engine) as session:
            kept = every(name="kept").save_sync(session)
            session.commit()
        with Session(engine) as session:
            dropped = every(name="dropped").save_sync(session)
            session.rollback()
        assert [task.name for task in stored()] == ["kept"]

        dropped.save_sync()
    finally:
        engine.dispose()

    assert {task.id for task in stored()} == {kept.id, dropped.id}


@on("sqlite", "postgresql")  # PyMySQL is not async
async def test_an_async_session_of_the_caller(project: Project) -> None:
    """The same for an AsyncSession, through its own driver."""
    engine = create_async_engine(project.database_url.replace("sqlite:", "sqlite+aiosqlite:"))
    try:
        async with AsyncSession(engine) as session, session.begin():
            await every(name="kept").save(session=session)
        async with AsyncSession(engine) as session:
            await every(name="dropped").save(session=session)
            await session.rollback()
    finally:
        await engine.dispose()

    assert [task.name for task in await Task.list()] == ["kept"]


def test_a_session_on_another_database_is_refused(project: Project, tmp_path: Path) -> None:
    """The Task would be where no beat looks."""
    engine = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    try:
        with Session(engine) as session, pytest.raises(ConfigurationError, match="the session is on"):
            every().save_sync(session)
    finally:
        engine.dispose()

    assert stored() == []


# -- many at once


def test_many_are_saved_in_one_transaction_of_few_statements(project: Project) -> None:
    """300 new ones and a changed one: each is stored, and shows it, as ``save`` would have it."""
    changed, statements = every(30, name="changed").save_sync(), list[str]()
    changed.interval_minutes = 5
    tasks = [
        *(Task(func_name="anything", name=f"{n}", params={"n": n}, schedule="0 3 * * *") for n in range(150)),
        changed,
        *(every(60, name=f"every {number}", priority=2) for number in range(150)),
    ]

    def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", count)
    try:
        assert Task.save_many_sync(tasks) == tasks
    finally:
        event.remove(Engine, "before_cursor_execute", count)

    assert len(statements) < 20
    assert len({task.id for task in tasks}) == 301
    for task in tasks:
        assert task.state is ScheduleState.ACTIVE
    found = {task.id: task for task in stored()}
    for task in (tasks[0], changed, tasks[-1]):
        for field in fields(task):
            if field.name != "_row":
                assert getattr(found[task.id], field.name) == getattr(task, field.name), field.name
    assert len(found) == 301


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (Task(func_name="sync_emials", interval_minutes=1), UnknownTaskFunctionError, r"^tasks\[2\]: no task function"),
        (every(params={"a": 1}), InvalidParamsError, r"^tasks\[2\]: params of 'sync_emails' do not fit"),
        (every(priority=11), InvalidOptionError, r"^tasks\[2\]: priority=11"),
        (Task(func_name="sync_emails", schedule="* * 31 2 *"), InvalidTriggerError, r"^tasks\[2\]: .*never fires"),
    ],
)
def test_one_that_is_refused_is_named_and_none_is_saved(
    bad: Task, error: type[LLMTasksError], message: str, on_sqlite: Project
) -> None:
    """The others stay as they were, on disk and in the hand."""
    known = every(30, name="known").save_sync()
    known.interval_minutes = 5
    others = [every(name="new"), known]

    with pytest.raises(error, match=message):
        Task.save_many_sync([*others, bad])

    assert [(task.name, task.interval_minutes) for task in stored()] == [("known", 30)]
    assert (others[0].id, others[0].state) == (None, None)


async def test_many_are_refused_by_what_is_stored_too(project: Project) -> None:
    """A cancelled one among them is named; so is one that is there twice."""
    gone, new = await (await every().save()).cancel(), every()

    with pytest.raises(ForbiddenTransitionError, match=r"^tasks\[1\]: .* is cancelled for good"):
        await Task.save_many([new, gone])
    with pytest.raises(ConfigurationError, match=r"^tasks\[2\]: expected each Task once, and this is tasks\[0\] too"):
        await Task.save_many([new, every(), new])
    assert [task.id for task in stored()] == [gone.id]

    saved = await Task.save_many(every(name=f"{number}") for number in range(3))
    assert [task.name for task in saved] == ["0", "1", "2"]
    assert await Task.save_many([]) == []


@on("sqlite", "postgresql")  # PyMySQL is not async
async def test_many_share_the_fate_of_the_callers_session(project: Project) -> None:
    """Commit: all exist. Rollback: none does."""
    engine = create_async_engine(project.database_url.replace("sqlite:", "sqlite+aiosqlite:"))
    try:
        async with AsyncSession(engine) as session, session.begin():
            await Task.save_many([every(name="kept 1"), every(name="kept 2")], session)
        async with AsyncSession(engine) as session:
            await Task.save_many([every(name="dropped")], session=session)
            await session.rollback()
    finally:
        await engine.dispose()

    assert [task.name for task in await Task.list()] == ["kept 1", "kept 2"]


# -- schedules that code declares


def test_a_declared_schedule_is_controlled_but_not_changed_by_a_task(project: Project) -> None:
    """Code owns the trigger and the options: a save that would change them is refused, the others do nothing."""
    with station().database.transaction() as tx:
        row = every(30, name="declared")._checked(station(), datetime.now(UTC))
        schedules.put(tx, replace(row, declared_key="llmtasks:declared"), datetime.now(UTC))
    task = Task.get_sync("declared")

    task.save_sync()
    task.pause_sync()
    task.interval_minutes = 5
    with pytest.raises(ForbiddenTransitionError, match="declared in code"):
        task.save_sync()

    found = Task.get_sync("declared")
    assert (found.state, found.interval_minutes) == (ScheduleState.PAUSED, 30)
