"""why, on rows: each state of a schedule and of a run has its answer, on every database."""

import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from llmtasks.dispatch import Station, station
from llmtasks.errors import RunNotFoundError
from llmtasks.states import RunState, ScheduleState
from llmtasks.store import outbox, processes, rows, schedules
from llmtasks.store.database import Database
from llmtasks.store.processes import Process
from llmtasks.task import Task
from llmtasks.why import Explanation, explain
from tests.commandline import app_with, command, document
from tests.conftest import DATABASES, parameters
from tests.servers import free_port

TASKS = """
from llmtasks.registry import task_registry

@task_registry.register(name="mail")
async def mail(): ...
"""
ID = "00000000-0000-4000-8000-000000000001"
OTHER = "00000000-0000-4000-8000-000000000002"


@pytest.fixture(scope="module", params=parameters(DATABASES))
def database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database with llmtasks' tables, which the tests of this module share."""
    server = None if request.param == "sqlite" else request.getfixturevalue(f"{request.param}_server")
    url = f"sqlite:///{tmp_path_factory.mktemp('why') / 'x.db'}" if server is None else server.create_database()
    database = Database(url)
    database.migrate()
    database.close()
    yield url
    if server is not None:
        server.drop_database(url)


@pytest.fixture
def at(tmp_path: Path, database_url: str) -> Iterator[Station]:
    """An app without processes whose broker is kombu's memory; nothing is in its tables."""
    with app_with(tmp_path, TASKS, LLMTASKS_DATABASE_URL=database_url) as app:
        emptied(station(app))
        yield station(app)


def emptied(at: Station) -> None:
    with at.database.transaction() as tx:
        for table in rows.metadata.sorted_tables:
            tx.execute(table.delete())


def alive(at: Station, *kinds: str, functions: tuple[str, ...] = ("mail",)) -> None:
    """Rows as processes write them that live."""
    now = at.database.now()
    with at.database.transaction() as tx:
        for kind in kinds:
            process = Process(
                id=f"a/{kind}", app=at.name, kind=kind, name=f"{kind}@host", pid=1, pool="prefork", concurrency=1,
                started_at=now, heartbeat_at=now + timedelta(hours=1), cpu_percent=0.0, memory=0, functions=functions,
            )  # fmt: skip
            processes.stamp(tx, process)


def run(at: Station, state: RunState, run_id: str = ID, **columns: Any) -> str:
    """A run that is in the ledger."""
    now = at.database.now()
    given = {
        "id": run_id, "app": at.name, "func_name": "mail", "name": "mail", "state": state, "priority": 5,
        "created_at": now, "delivered": state.is_final, "ended_at": now if state.is_final else None, **columns,
    }  # fmt: skip
    with at.database.transaction() as tx:
        tx.execute(rows.runs.insert().values(given))
    return run_id


def owe(at: Station, seconds: float = 0) -> None:
    """Owe the broker the message of the run, in so many seconds."""
    with at.database.transaction() as tx:
        outbox.put(tx, at.name, [ID], at.database.now() + timedelta(seconds=seconds))


def hold(at: Station, scope: str, *run_ids: str) -> None:
    """Let runs have the slots of a scope."""
    with at.database.transaction() as tx:
        for place, run_id in enumerate(run_ids):
            row = {"scope": scope, "place": place, "run_id": run_id, "taken_at": at.database.now()}
            tx.execute(rows.slots.insert().values(row))


def facts_of(found: Explanation) -> dict[str, Any]:
    """The facts by name; the last of those that share one."""
    return {fact.name: fact.value for fact in found.facts}


def daily(**options: Any) -> Task:
    """A Task that runs each day at three in Berlin."""
    return Task(func_name="mail", schedule="0 3 * * *", timezone="Europe/Berlin", **options).save_sync()


def moved(at: Station, task: Task, **columns: Any) -> str:
    """A Task whose row somebody else has changed."""
    with at.database.transaction() as tx:
        tx.execute(rows.schedules.update().where(rows.schedules.c.id == task.id).values(columns))
    assert task.id is not None
    return task.id


# -- schedules


def test_paused_schedule_says_who_paused_it_and_since_when(at: Station) -> None:
    """Where nobody said who, since when alone."""
    named, unnamed = daily(name="a").pause_sync(by="alice"), daily(name="b").pause_sync()
    assert named.id is not None
    assert unnamed.id is not None

    found, other = explain(at, named.id), explain(at, unnamed.id)

    assert (found.kind, found.id, found.name, found.state) == ("task", named.id, "a", "paused")
    assert found.answer.startswith(f"schedule 'a' is paused by alice since {named.paused_at:%Y-%m-%d %H:%M:%S} UTC (")
    assert facts_of(found)["paused"] == named.paused_at
    assert other.answer.startswith("schedule 'b' is paused since ")


def test_schedule_that_is_over_says_why(at: Station) -> None:
    """Completed, cancelled, and set aside are not the same."""
    task = daily()
    assert task.id is not None
    answers: list[str] = []
    for state, reason in (
        ("completed", "it fired"),
        ("cancelled", "not needed"),
        ("active", "set aside: no such zone"),
    ):
        moved(at, task, state=state, reason=reason, next_run_at=None)
        answers.append(explain(at, task.id).answer)

    assert answers == [
        "schedule 'mail' is completed: it fired",
        "schedule 'mail' is cancelled: not needed",
        "schedule 'mail' was set aside: no such zone",
    ]


def test_active_schedule_says_when_it_is_due_in_utc_and_in_its_zone(at: Station) -> None:
    """And in how long; nothing else is in its way."""
    alive(at, "worker", "beat")
    task_id = moved(at, daily(), next_run_at=datetime(2999, 7, 1, 1, 0, tzinfo=UTC))

    found = explain(at, task_id)

    assert found.answer.startswith(
        "schedule 'mail' is next due at 2999-07-01 01:00:00 UTC (2999-07-01 03:00:00 Europe/Berlin), in "
    )
    assert "but" not in found.answer
    assert facts_of(found)["next due"] == datetime(2999, 7, 1, 1, 0, tzinfo=UTC)
    assert facts_of(found)["workers that know it"] == "worker@host"


def test_active_schedule_says_who_is_missing(at: Station) -> None:
    """A beat first, then a worker, then one that knows the function."""
    task_id = moved(at, daily(), next_run_at=datetime(2999, 7, 1, 1, 0, tzinfo=UTC))
    answers = [explain(at, task_id).answer]
    alive(at, "beat")
    answers.append(explain(at, task_id).answer)
    alive(at, "worker", functions=("other",))
    answers.append(explain(at, task_id).answer)

    assert [answer.rpartition(", ")[2] for answer in answers] == [
        "but no beat is alive to fire it",
        "but no worker is alive to run it",
        "but no live worker knows 'mail'",
    ]


def test_overdue_schedule_says_how_late_it_is(at: Station) -> None:
    """Without a beat that is the reason; with one it is something else's."""
    task_id = moved(at, daily(), next_run_at=at.database.now() - timedelta(minutes=10))

    without = explain(at, task_id).answer
    alive(at, "beat", "worker")
    with_beat = explain(at, task_id).answer
    moved(at, Task.get_sync(task_id), next_run_at=at.database.now() - timedelta(seconds=1))
    now_due = explain(at, task_id).answer

    assert " was due at " in without
    assert without.endswith("10 min ago, but no beat is alive to fire it")
    assert with_beat.endswith("10 min ago, although 1 beat is alive")
    assert "is due now, since " in now_due


def test_schedule_says_why_its_last_instant_did_not_run(at: Station) -> None:
    """With its live runs beside it, which may be why."""
    alive(at, "worker", "beat")
    task = daily()
    instant = datetime(2026, 3, 1, 2, 0, tzinfo=UTC)
    why = "the only slot of schedule 'mail' was taken"
    run(at, RunState.SKIPPED, schedule_id=task.id, scheduled_for=instant, reason=why)
    run(at, RunState.RUNNING, OTHER, schedule_id=task.id, worker="worker@host")
    assert task.id is not None

    found = explain(at, task.id)

    assert found.answer.endswith(f"; its last instant was skipped: {why}")
    assert facts_of(found)["last instant"] == instant
    assert facts_of(found)["its run"] == f"{ID} is skipped: {why}"
    assert facts_of(found)["live run"] == f"{OTHER} is running on worker@host"


# -- runs that have not ended


def test_pending_run_waits_for_its_time_or_for_somebody_to_send_it(at: Station) -> None:
    """A countdown is no delay; without a worker and a beat nobody sends."""
    run(at, RunState.PENDING)
    owe(at, 3_600)
    delayed = explain(at, ID)
    owe(at)
    unsent = explain(at, ID)
    alive(at, "worker", functions=("other",))
    about = explain(at, ID)

    assert delayed.answer.startswith("run of 'mail': it was asked for at ")
    assert delayed.answer.endswith(", and no worker or beat is alive to send it then")
    assert "in 59 min" in delayed.answer
    assert unsent.answer == "run of 'mail': its message waits in the outbox, and no worker or beat is alive to send it"
    assert facts_of(unsent)["publications"] == "none yet"
    assert about.answer.endswith("is in the outbox and about to be sent, but no live worker knows 'mail'")


def test_queued_run_without_a_worker_says_so(at: Station) -> None:
    """With its queue, since when, and how often it was sent."""
    since = at.database.now() - timedelta(minutes=2)
    run(at, RunState.QUEUED, queue="letters", published_at=since, publications=2)

    found = explain(at, ID)

    assert found.answer == "run of 'mail': it is in queue 'letters', and no worker is alive"
    facts = facts_of(found)
    assert (facts["queue"], facts["queued since"], facts["publications"]) == ("letters", since, "2")
    assert facts["workers alive"] == "none"


def test_queued_run_whose_workers_do_not_answer_says_so(at: Station) -> None:
    """What they consume is then not known: they are busy."""
    alive(at, "worker")
    run(at, RunState.QUEUED, published_at=at.database.now())

    found = explain(at, ID)

    assert found.answer.endswith(
        "it is in queue 'celery'; the live workers do not say what they consume: they are busy"
    )
    assert facts_of(found)["do not answer"] == "worker@host"


def test_queued_run_of_an_unknown_function_may_be_in_another_queue(at: Station) -> None:
    """Where neither the run nor anything here names its queue, the answer does not pretend."""
    run(at, RunState.QUEUED, func_name="elsewhere", published_at=at.database.now())

    assert "is not imported here" in facts_of(explain(at, ID))["perhaps another"]


def test_waiting_run_says_who_has_its_slot(at: Station) -> None:
    """And how many are before it; a schedule's limit counts as well as the function's."""
    alive(at, "worker")
    scope = f"function:{at.name}:mail"
    created = at.database.now()
    run(at, RunState.WAITING, function_slots=1, created_at=created, schedule_id="s", schedule_slots=2)
    run(at, RunState.WAITING, "before", function_slots=1, created_at=created - timedelta(seconds=9))
    run(at, RunState.RUNNING, OTHER, function_slots=1, worker="worker@host")
    hold(at, scope, OTHER)

    found = explain(at, ID)
    with at.database.transaction() as tx:
        tx.execute(rows.slots.delete())
    hold(at, "schedule:s", "one", "two")
    by_schedule = explain(at, ID)

    assert found.answer == (
        f"run of 'mail': it waits for a slot of function 'mail', held by {OTHER} on worker@host; 1 run before it"
    )
    held = [fact.value for fact in found.facts if fact.name == "held by"]
    assert len(held) == 1
    assert str(held[0]).startswith(f"{OTHER} on worker@host, running, since ")
    assert "of schedule 'mail', held by one, two; 0 runs before it" in by_schedule.answer


def test_waiting_run_with_a_free_slot_is_about_to_go(at: Station) -> None:
    """Or nobody is there to hand it over."""
    run(at, RunState.WAITING, function_slots=1)

    alone = explain(at, ID).answer
    alive(at, "beat")

    assert alone.endswith("; no worker or beat is alive to hand it over")
    assert explain(at, ID).answer.endswith("a slot is free and about to be handed to whoever is first in line")


def test_retrying_run_says_when_and_after_what(at: Station) -> None:
    """The next attempt, the last error, how many attempts there are."""
    alive(at, "worker")
    then = at.database.now() + timedelta(minutes=5, seconds=1)
    run(at, RunState.RETRYING, attempts=2, max_retries=3, next_attempt_at=then, error="ValueError: no such page")

    found = explain(at, ID)

    assert found.answer.startswith(
        f"run of 'mail': attempt 2 failed, and the next is due at {then:%Y-%m-%d %H:%M:%S} UTC"
    )
    assert found.answer.endswith(", in 5 min")
    facts = facts_of(found)
    assert (facts["next attempt"], facts["last error"]) == (then, "ValueError: no such page")
    assert facts["attempts"] == "2 ended of at most 4"


def test_running_run_whose_worker_is_silent_is_lost(at: Station) -> None:
    """Some keeper dispatches it again, or there is none."""
    silent = at.database.now() - timedelta(minutes=1)
    run(at, RunState.RUNNING, worker="worker@host", heartbeat_at=silent, attempt_started_at=silent)

    alone = explain(at, ID).answer
    alive(at, "beat")

    assert "its worker worker@host gave its last heartbeat 1 min ago and counts as lost: " in alone
    assert alone.endswith("no worker or beat is alive to dispatch it again")
    assert explain(at, ID).answer.endswith("a keeper dispatches it again")


def test_running_run_says_that_it_is_to_be_cancelled(at: Station) -> None:
    """Its worker was asked, and has not done it yet."""
    now = at.database.now()
    run(
        at, RunState.RUNNING, worker="worker@host", heartbeat_at=now, attempt_started_at=now - timedelta(minutes=3),
        cancel_requested_at=now - timedelta(seconds=20), reason="not needed",
    )  # fmt: skip

    found = explain(at, ID)

    assert "it runs on worker@host since " in found.answer
    assert ", for 3 min" in found.answer
    assert found.answer.endswith(" s ago")
    assert "; its worker was asked to cancel it 20." in found.answer
    assert facts_of(found)["reason"] == "not needed"


# -- runs that have ended


@pytest.mark.parametrize(
    ("state", "columns", "begin", "end"),
    [
        (RunState.SUCCEEDED, {"attempts": 2, "run_seconds": 1.5}, "it succeeded in attempt 2 at ", " ago"),
        (
            RunState.FAILED,
            {"attempts": 4, "error": "ValueError: no"},
            "it failed after 4 attempts at ",
            ": ValueError: no",
        ),
        (RunState.CANCELLED, {"reason": "not needed"}, "it was cancelled at ", ": not needed"),
        (RunState.SKIPPED, {"reason": "its message expired"}, "it was skipped at ", ": its message expired"),
    ],
)
def test_ended_run_says_how(at: Station, state: RunState, columns: dict[str, Any], begin: str, end: str) -> None:
    """When, and why; nothing is in its way any more."""
    run(at, state, worker="worker@host", **columns)

    found = explain(at, ID)

    assert found.answer.startswith(f"run of 'mail': {begin}")
    assert found.answer.endswith(end)
    assert "workers alive" not in facts_of(found)


def test_end_that_celery_does_not_know_says_what_is_in_the_way(at: Station) -> None:
    """Its worker tells it, nobody has tried, or it was told in vain."""
    now = at.database.now()
    run(at, RunState.SUCCEEDED, delivered=False, owner="host/one", heartbeat_at=now)
    being_told = explain(at, ID).answer
    with at.database.transaction() as tx:
        tx.execute(rows.runs.update().values(owner=None))
    untold = explain(at, ID).answer
    with at.database.transaction() as tx:
        tx.execute(rows.runs.update().values(delivery_sent_at=now, publications=4))
    in_vain = explain(at, ID)

    assert being_told.endswith("; its worker is telling Celery so")
    assert untold.endswith("; Celery has not been told; a keeper sends it")
    assert in_vain.answer.endswith("; Celery was told in vain 4 times: no worker is alive")
    assert facts_of(in_vain)["told last"] == now


def test_cancelled_id_that_nobody_sent_says_so(at: Station) -> None:
    """When it comes it does not start."""
    Task.cancel_run_sync(ID, "a mistake")

    answer = explain(at, ID).answer

    assert answer.startswith("it was cancelled at ")
    assert answer.endswith(": a mistake; nobody has sent it yet, and when it comes it does not start")


# -- the command


def test_why_takes_names_and_ids(at: Station) -> None:
    """The first line is the answer, then come the facts; --json has the same."""
    task = daily(name="nightly").pause_sync(by="alice")

    by_name, by_id = command("why", "nightly"), document("why", str(task.id))

    head, empty, *facts = by_name.stdout.splitlines()
    assert (by_name.exit_code, empty) == (0, "")
    assert head.startswith("schedule 'nightly' is paused by alice since ")
    assert [line.split("  ")[0] for line in facts] == [fact["name"] for fact in by_id["facts"]]
    assert (by_id["kind"], by_id["state"], by_id["name"]) == ("task", "paused", "nightly")
    assert datetime.fromisoformat(by_id["facts"][0]["value"]) == task.paused_at


def test_unknown_or_ambiguous_target_is_an_error(at: Station) -> None:
    """One line on stderr, exit code 1, as with the other commands."""
    daily(name="twin")
    daily(name="twin")

    for target, complaint in {
        "nobody": "no Task has the id or name 'nobody', and no run the id",
        OTHER: f"no Task or run has the id '{OTHER}'",
        "twin": "2 Tasks are named 'twin'",
    }.items():
        done = command("why", target)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"Error: {complaint}")
    with pytest.raises(RunNotFoundError):
        explain(at, OTHER)


def test_run_that_only_celery_knows_is_said_to_be_so(at: Station) -> None:
    """The result backend has a state for it."""
    sent = str(uuid.uuid4())  # a backend in memory outlives the test
    at.app.backend.store_result(sent, None, "STARTED")

    found = explain(at, sent)

    assert (found.state, found.answer) == ("STARTED", "it is not in the ledger; Celery says STARTED")


def test_why_answers_without_a_broker(tmp_path: Path, database_url: str) -> None:
    """Soon, and it says that the broker is away."""
    url = f"redis://127.0.0.1:{free_port()}/0"
    with app_with(tmp_path, TASKS, LLMTASKS_DATABASE_URL=database_url, LLMTASKS_BROKER_URL=url) as app:
        answers = _answers_without_a_broker(app)

    assert answers["schedule"].endswith(", but the broker does not answer: its runs wait in the outbox")
    assert answers["pending"].endswith("its message waits in the outbox: the broker does not answer")
    assert answers["queued"].endswith("it was sent to queue 'celery', and the broker does not answer now")


def _answers_without_a_broker(app: Celery) -> dict[str, str]:
    at = station(app)
    emptied(at)
    alive(at, "worker", "beat")
    run(at, RunState.PENDING)
    owe(at)
    run(at, RunState.QUEUED, OTHER, published_at=at.database.now())
    began = time.monotonic()
    found = {"pending": explain(at, ID), "queued": explain(at, OTHER), "schedule": explain(at, daily().id or "")}

    assert time.monotonic() - began < 30
    for explanation in found.values():
        assert "does not answer" in facts_of(explanation)["broker"]
    return {name: explanation.answer for name, explanation in found.items()}


def test_zone_that_is_unknown_here_is_shown_as_it_is(at: Station) -> None:
    """A row that another host wrote has an answer too."""
    task_id = moved(at, daily(), timezone="Mars/Olympus", next_run_at=datetime(2999, 7, 1, 1, 0, tzinfo=UTC))

    with at.database.reading() as connection:
        stored = schedules.get(connection, task_id)

    assert stored is not None
    assert stored.state is ScheduleState.ACTIVE
    assert facts_of(explain(at, task_id))["in its zone"] == "'Mars/Olympus' is no zone"
