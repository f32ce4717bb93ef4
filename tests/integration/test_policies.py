"""Policies of schedules on a real database: what is stored, what a tick decides, what is backfilled. No process."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select

from llmtasks import Run, Task
from llmtasks.beat import sync, tick
from llmtasks.dispatch import publish, station
from llmtasks.errors import ForbiddenTransitionError, InvalidOptionError, InvalidTriggerError, LLMTasksError
from llmtasks.options import TaskOptions
from llmtasks.states import RunState, ScheduleState
from llmtasks.store import rows, runs, schedules
from tests.processes import Project
from tests.servers import Valkey
from tests.waiting import wait_until

TASKS = """
    from datetime import datetime, UTC
    from llmtasks import task_registry

    @task_registry.register(name="work")
    def work():
        return None

    @task_registry.register(
        name="declared", interval_minutes=30, max_instances=2, overlap="queue_one", misfire="all", misfire_window=600,
        starts_at=datetime(2020, 1, 1, tzinfo=UTC), ends_at=datetime(2999, 1, 1, tzinfo=UTC), max_runs=7,
        jitter_seconds=5,
    )
    def declared():
        return None
"""
MINUTE = timedelta(minutes=1)
FAR = datetime(2999, 1, 1, tzinfo=UTC)

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


def now() -> datetime:
    return station().database.now()


def every(minutes: float = 60, **values: Any) -> Task:
    return Task(func_name="work", interval_minutes=minutes, **values)


def due(task: Task) -> Task:
    """The Task, whose next run is now."""
    move = schedules.Advance(schedule_id=task.id or "", next_at=now(), last_at=None, to=ScheduleState.ACTIVE, why=None)
    with station().database.transaction() as tx:
        schedules.advance(tx, [move])
    return task


def runs_of(task: Task) -> list[Run]:
    """Its runs in the order of their opening."""
    with station().database.reading() as connection:
        found = runs.find(connection, station().name, schedule_id=task.id)
    return sorted(found, key=lambda run: (run.created_at, run.scheduled_for or run.created_at))


def set_run(run: Run, **values: Any) -> None:
    with station().database.transaction() as tx:
        tx.execute(rows.runs.update().where(rows.runs.c.id == run.id).values(**values))


# -- what is stored


def test_policies_come_back_as_they_were_given(project: Project) -> None:
    """In another process too; a window may be a timedelta, naive bounds are local time."""
    begin, end = datetime.now() + MINUTE, datetime.now() + timedelta(days=3)
    task = every(
        overlap="queue_one", misfire="all", misfire_window=timedelta(minutes=5), starts_at=begin, ends_at=end,
        max_runs=3, jitter_seconds=1.5,
    ).save_sync()  # fmt: skip

    found = Task.get_sync(task.id or "")

    assert (found.overlap, found.misfire, found.misfire_window) == ("queue_one", "all", 300)
    assert (found.starts_at, found.ends_at) == (begin.astimezone(UTC), end.astimezone(UTC))
    assert (found.max_runs, found.jitter_seconds, found.fired) == (3, 1.5, 0)
    assert found.save_sync().next_run_at == task.next_run_at == found.starts_at


WRONG: list[tuple[dict[str, Any], type[LLMTasksError], str]] = [
    ({"overlap": "queue"}, InvalidOptionError, "overlap='queue': expected one of 'skip', 'queue_one', 'allow', "),
    ({"overlap": True}, InvalidOptionError, "overlap=True: expected one of"),
    ({"misfire_window": 60}, InvalidOptionError, "misfire_window=60: expected a window only together with misf"),
    ({"misfire": "all", "misfire_window": 0}, InvalidOptionError, "misfire_window=0: expected a number of seconds"),
    ({"misfire": "all", "misfire_window": "1h"}, InvalidOptionError, "misfire_window='1h': expected .* or a timedelta"),
    ({"misfire": "all", "misfire_window": float("inf")}, InvalidOptionError, "well below a million years"),
    ({"max_runs": 0}, InvalidOptionError, "max_runs=0: expected a whole number from 1"),
    ({"max_runs": 1.5}, InvalidOptionError, "max_runs=1.5: expected a whole number from 1"),
    ({"jitter_seconds": -1}, InvalidOptionError, "jitter_seconds=-1: expected a number from 0"),
    ({"jitter_seconds": "5"}, InvalidOptionError, "jitter_seconds='5': expected a number from 0"),
    ({"jitter_seconds": 1e300}, InvalidOptionError, "jitter_seconds=1e\\+300: expected a number of seconds well below"),
    ({"starts_at": "today"}, InvalidTriggerError, "starts_at='today': expected a datetime"),
    ({"starts_at": FAR, "ends_at": FAR - MINUTE}, InvalidTriggerError, "starts_at=2999.*: expected not after ends_at"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "error", "message"), WRONG)
def test_a_wrong_policy_is_refused_and_nothing_is_stored(
    tmp_path: Path, valkey_server: Valkey, values: dict[str, Any], error: type[LLMTasksError], message: str
) -> None:
    """By ``save`` and by ``register`` alike, with the value, what was expected and what to do."""
    project = Project(tmp_path / "project", broker=valkey_server, database_url=f"sqlite:///{tmp_path / 'tasks.db'}")
    project.tasks(TASKS)
    assert project.app
    try:
        with pytest.raises(error, match=message):
            every(**values).save_sync()
        assert Task.list_sync() == []
    finally:
        project.close()
    with pytest.raises(error, match=message):
        TaskOptions.build("work", {"interval_minutes": 60, **values}, None)


def test_a_one_off_before_its_start_is_refused(project: Project) -> None:
    """It would never run."""
    with pytest.raises(
        InvalidTriggerError, match=r"starts_at=2999.*expected not after the last instant of its trigger"
    ):
        Task(func_name="work", scheduled_at=now() + MINUTE, starts_at=FAR).save_sync()


def test_changed_policies_do_not_move_the_next_run(project: Project) -> None:
    """Saving again changes what happens at the next instant, not when it is."""
    task = every(misfire="all").save_sync()
    first = task.next_run_at

    task.overlap, task.misfire_window, task.max_runs, task.jitter_seconds = "allow", 60, 9, 3
    task.ends_at = FAR
    task.save_sync()

    found = Task.get_sync(task.id or "")
    assert (found.next_run_at, found.overlap, found.misfire_window, found.max_runs) == (first, "allow", 60, 9)


def test_a_start_that_is_moved_moves_the_next_run(project: Project) -> None:
    """Forward and back; one that passed moves nothing."""
    task = Task(func_name="work", schedule="0 5 * * *", timezone="UTC").save_sync()
    first = task.next_run_at

    task.starts_at = datetime(2998, 7, 1, tzinfo=UTC)
    assert task.save_sync().next_run_at == datetime(2998, 7, 1, 5, tzinfo=UTC)
    assert task.next_runs(2) == [datetime(2998, 7, day, 5, tzinfo=UTC) for day in (1, 2)]
    assert task.pause_sync().resume_sync().next_run_at == datetime(2998, 7, 1, 5, tzinfo=UTC)
    task.starts_at = datetime(2020, 1, 1, tzinfo=UTC)
    assert task.save_sync().next_run_at == first
    task.starts_at = None
    assert task.save_sync().next_run_at == first


def test_next_runs_end_with_max_runs_and_with_the_end(project: Project) -> None:
    """Whichever comes first."""
    task = every(max_runs=3).save_sync()

    assert len(task.next_runs(10)) == 3
    task.ends_at = (task.next_run_at or now()) + timedelta(hours=1)
    assert len(task.save_sync().next_runs(10)) == 2


def test_declared_policies_are_codes(project: Project) -> None:
    """Beat writes them; they can be seen, and not changed here; a second start changes nothing."""
    at = station()
    sync.write(at, sync.declared_of(at))
    task = Task.get_sync("declared")

    assert (task.overlap, task.misfire, task.misfire_window, task.max_instances) == ("queue_one", "all", 600, 2)
    assert (task.starts_at, task.ends_at) == (datetime(2020, 1, 1, tzinfo=UTC), FAR)
    assert (task.max_runs, task.jitter_seconds) == (7, 5)
    sync.write(at, sync.declared_of(at))
    assert Task.get_sync("declared").updated_at == task.updated_at
    assert task.save_sync().updated_at == task.updated_at
    task.overlap = "allow"
    with pytest.raises(ForbiddenTransitionError, match="is declared in code"):
        task.save_sync()


# -- what a tick decides


def test_a_tick_skips_what_overlaps_and_says_which_run_is_in_the_way(project: Project) -> None:
    """The instant has its row; when that run has ended the next one runs."""
    task = due(every().save_sync())
    tick.claim_due(station())
    due(task)
    tick.claim_due(station())

    first, second = runs_of(task)
    assert (second.state, second.delivered) == (RunState.SKIPPED, True)
    assert (
        second.reason
        == f"overlap policy skip: run {first.id} ({(first.scheduled_for or now()).isoformat()}) is pending"
    )

    set_run(first, state=RunState.SUCCEEDED)
    due(task)
    tick.claim_due(station())
    assert runs_of(task)[2].state is RunState.PENDING
    assert Task.get_sync(task.id or "").fired == 2


def test_a_run_by_hand_is_not_skipped_and_is_in_the_way(project: Project) -> None:
    """Whoever asks for a run gets it; the schedule does not start another beside it."""
    task = every().save_sync()
    by_hand, again = task.execute_now_sync(), task.execute_now_sync()
    due(task)
    tick.claim_due(station())

    assert {by_hand.state, again.state} <= {RunState.PENDING, RunState.QUEUED}
    assert (runs_of(task)[2].reason or "").startswith(f"overlap policy skip: run {by_hand.id} (by hand) is ")


def test_a_tick_asks_once_for_all_schedules(project: Project) -> None:
    """The number of statements does not grow with the schedules, and "allow" asks for nothing."""
    counts = {}
    for name, number, overlap in (("one", 1, "skip"), ("many", 20, "skip"), ("allowed", 20, "allow")):
        tasks = [every(overlap=overlap).save_sync() for _ in range(number)]
        for _ in range(2):  # nothing is unfinished at the first tick, all of them are at the second
            for task in tasks:
                due(task)
            counts[name] = statements_of_a_tick()

    assert counts["many"] <= counts["one"]
    assert counts["allowed"] <= counts["many"] + 2  # the runs' messages instead of the skipped rows


def statements_of_a_tick() -> int:
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.append(statement)

    engine = station().database._open_engine()
    event.listen(engine, "before_cursor_execute", note)
    tick.claim_due(station())
    event.remove(engine, "before_cursor_execute", note)
    return len(seen)


def test_jitter_keeps_the_message_back_and_no_longer(project: Project) -> None:
    """The outbox has its time; nobody sends it before, the keeper sends it then, and a repeated tick moves nothing."""
    at = station()
    task = due(every(jitter_seconds=3000).save_sync())
    assert tick.claim_due(at).messages == []
    (run,) = runs_of(task)
    available = available_at(run)

    with at.database.transaction() as tx:
        tx.execute(rows.schedules.update().values(next_run_at=run.scheduled_for))
    assert tick.claim_due(at).messages == []

    assert runs_of(task) == [run]
    assert available_at(run) == available
    assert timedelta() < available - (run.scheduled_for or now()) < timedelta(seconds=3000)
    assert (run.reason or "").startswith("jitter: sent ")
    task.cancel_sync()
    assert runs_of(task)[0].state is RunState.CANCELLED


def available_at(run: Run) -> datetime:
    with station().database.reading() as connection:
        query = select(rows.outbox.c.available_at).where(rows.outbox.c.run_id == run.id)
        found: datetime = connection.execute(query).scalar_one()
    return found


def test_max_runs_completes_a_schedule_that_may_go_on_with_more(project: Project) -> None:
    """With its reason; raising the number lets it go on, a number below what there was is refused."""
    task = due(every(max_runs=2, overlap="allow").save_sync())
    tick.claim_due(station())
    task = due(Task.get_sync(task.id or ""))
    tick.claim_due(station())

    over = Task.get_sync(task.id or "")
    assert (over.state, over.reason, over.fired) == (ScheduleState.COMPLETED, "max_runs: it had all of its 2", 2)
    assert over.next_run_at is None
    over.max_runs = 3
    assert over.save_sync().state is ScheduleState.ACTIVE
    assert len(over.next_runs()) == 1
    over.max_runs = 1
    with pytest.raises(InvalidOptionError, match="max_runs=1: expected more than the 2 runs that it had already"):
        over.save_sync()
    assert Task.get_sync(over.id or "").max_runs == 3


def test_a_later_end_lets_a_completed_schedule_go_on(project: Project) -> None:
    """On its grid."""
    task = due(every().save_sync())
    first = task.next_run_at
    task.ends_at = first
    tick.claim_due(station())
    task = Task.get_sync(task.id or "")
    with station().database.transaction() as tx:
        tx.execute(rows.schedules.update().values(state="completed", next_run_at=None, reason="it reached its end"))

    task = Task.get_sync(task.id or "")
    task.ends_at = FAR
    task.save_sync()

    assert (task.state, task.reason, task.next_run_at) == (ScheduleState.ACTIVE, None, first)


# -- backfill


def at_minutes(*minutes: int) -> list[datetime]:
    return [datetime(2026, 3, 2, 12, minute, tzinfo=UTC) for minute in minutes]


def minutely(**values: Any) -> Task:
    return Task(func_name="work", schedule="* * * * *", timezone="UTC", **values).save_sync()


async def test_backfill_runs_each_instant_once(project: Project) -> None:
    """Both ends are included; what has its run gets no other; the schedule does not move."""
    task = minutely()
    first, *_, last = at_minutes(0, 4)

    opened = await task.backfill(first, last)
    again = await task.backfill(first - MINUTE, last)

    assert [run.scheduled_for for run in opened] == at_minutes(0, 1, 2, 3, 4)
    assert [run.scheduled_for for run in again] == [first - MINUTE]
    assert {run.backfilled for run in opened} == {True}
    assert opened[0].reason == "backfill 2026-03-02T12:00:00+00:00 to 2026-03-02T12:04:00+00:00"
    found = Task.get_sync(task.id or "")
    assert (found.next_run_at, found.last_run_at, found.fired) == (task.next_run_at, None, 0)
    wait_until(lambda: {run.state for run in runs_of(task)} == {RunState.QUEUED}, 30, "all are sent")


def test_backfilled_runs_neither_overlap_nor_are_counted(project: Project) -> None:
    """The schedule's own run starts beside them; with "cancel_running" they are not cancelled."""
    for overlap in ("skip", "cancel_running"):
        task = minutely(overlap=overlap)
        opened = task.backfill_sync(*at_minutes(0, 2))
        due(task)
        claimed = tick.claim_due(station())
        publish(station(), claimed.messages)

        assert claimed.cancelled == []
        assert {run.state for run in runs_of(task)} == {RunState.QUEUED}
        assert len(runs_of(task)) == len(opened) + 1


def test_backfill_runs_what_a_policy_skipped(project: Project) -> None:
    """Its trace gives way to the run, whose reason keeps it."""
    task = due(every().save_sync())
    by_hand = task.execute_now_sync()
    tick.claim_due(station())
    skipped = runs_of(task)[-1]
    assert skipped.state is RunState.SKIPPED

    # The instant was asked for, which is none of an interval's grid; this one is.
    with station().database.transaction() as tx:
        anchor = (skipped.scheduled_for or now()) + timedelta(hours=3)
        tx.execute(rows.schedules.update().values(anchor=anchor))
    opened = task.backfill_sync(skipped.scheduled_for or now(), now())

    assert [run.id for run in opened] == [skipped.id]
    assert (opened[0].reason or "").endswith(f"; before: {skipped.reason}")
    assert len(runs_of(task)) == 2
    assert by_hand.id != skipped.id


def test_backfill_keeps_to_the_schedules_bounds_and_grid(project: Project) -> None:
    """An interval's grid goes back before its first run, no farther than its start."""
    anchor = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    task = every(60, next_run_at=anchor).save_sync()
    wanted = [anchor - timedelta(hours=hours) for hours in (4, 3, 2)]

    assert [run.scheduled_for for run in task.backfill_sync(wanted[0], wanted[-1] + MINUTE)] == wanted

    bounded = every(60, next_run_at=anchor, starts_at=wanted[1]).save_sync()
    assert [run.scheduled_for for run in bounded.backfill_sync(wanted[0], wanted[-1])] == wanted[1:]


def test_backfill_takes_naive_datetimes_as_local(project: Project) -> None:
    """As everywhere."""
    task = minutely()
    begin = datetime.now().replace(second=0, microsecond=0) - 3 * MINUTE

    opened = task.backfill_sync(begin, begin + MINUTE)

    assert [run.scheduled_for for run in opened] == [begin.astimezone(UTC), (begin + MINUTE).astimezone(UTC)]


def test_backfill_refuses_what_it_cannot_do_and_opens_nothing(project: Project) -> None:
    """Too many runs, with their number; the future; ends the wrong way round."""
    task = minutely()
    noon, soon = at_minutes(0)[0], now() + timedelta(hours=1)
    wrong: list[tuple[Any, Any, dict[str, Any], type[LLMTasksError], str]] = [
        (noon, noon + 9 * MINUTE, {"limit": 9}, InvalidOptionError, "limit=9: expected at least 10, as many runs as"),
        (noon, noon + timedelta(days=1), {}, InvalidOptionError, "limit=1000: expected at least 1,441, as many runs"),
        (noon - timedelta(days=99), noon, {}, InvalidOptionError, "expected fewer than 100,000 instants"),
        (noon, soon, {}, InvalidOptionError, "end=.*: expected an instant not after now"),
        (noon, noon - MINUTE, {}, InvalidOptionError, "start=.*: expected an instant not after end"),
        ("noon", noon, {}, InvalidTriggerError, "start='noon': expected a datetime"),
        (noon, noon, {"limit": 0}, InvalidOptionError, "limit=0: expected a whole number from 1 to 100000"),
    ]
    for start, end, more, error, message in wrong:
        with pytest.raises(error, match=message):
            task.backfill_sync(start, end, **more)

    assert runs_of(task) == []


def test_an_instant_that_was_backfilled_is_not_run_by_beat(project: Project) -> None:
    """Whoever comes first: the key lets one run be."""
    task = due(every().save_sync())
    with station().database.transaction() as tx:
        stored = schedules.get(tx, task.id or "")
        assert stored is not None
        tx.execute(rows.schedules.update().values(anchor=stored.next_run_at))
    (run,) = task.backfill_sync(stored.next_run_at or now(), now())

    claimed = tick.claim_due(station())

    assert [found.id for found in runs_of(task)] == [run.id]
    assert claimed.messages == []
