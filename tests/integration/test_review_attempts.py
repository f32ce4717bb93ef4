"""Attempts whose telling goes wrong: what the ledger has is what Celery is told in the end, sooner or later."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from celery import Celery, chain
from celery.app.trace import build_tracer
from sqlalchemy import update

from llmtasks import sender, task_registry
from llmtasks.dispatch import Station, cancel_run, publish, relay_due, station
from llmtasks.errors import BrokerUnavailableError
from llmtasks.holding import holdings
from llmtasks.install import install
from llmtasks.message import DELIVER
from llmtasks.states import RunState
from llmtasks.store import outbox, rows, runs, schedules, slots
from llmtasks.store.runs import NewRun, Run
from llmtasks.store.schedules import Schedule
from tests.processes import app_in_this_process


@task_registry.register(name="attempts_ok", max_retries=0)
def attempts_ok() -> str:
    return "done"


@task_registry.register(name="attempts_tracked", max_retries=0, track_started=True)
def attempts_tracked() -> str:
    return "done"


@task_registry.register(name="attempts_retry_unspeakably", bind=True, max_retries=2, retry_delay=0)
def attempts_retry_unspeakably(self: Any) -> None:
    raise self.retry(args=(object(),))


@task_registry.register(name="attempts_throw", max_retries=2, retry_delay=0, throws=cast("Any", ValueError))
def attempts_throw() -> None:
    raise ValueError("expected")


@task_registry.register(name="attempts_fail", max_retries=2, retry_delay=60)
def attempts_fail() -> None:
    raise ValueError("again")


@task_registry.register(name="attempts_replace", bind=True, max_retries=0)
def attempts_replace(self: Any) -> Any:
    return self.replace(attempts_ok.si())


@task_registry.register(name="attempts_become_chain", bind=True, max_retries=0)
def attempts_become_chain(self: Any) -> Any:
    return self.replace(chain(attempts_ok.si(), attempts_tracked.si()))


calls: list[str] = []


@task_registry.register(name="attempts_call_back", max_retries=0, on_success=lambda run, _value: calls.append(run.id))
def attempts_call_back() -> None: ...


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    """An app in this process, on a broker and a backend in memory."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    environ = {
        "LLMTASKS_HOME": str(tmp_path),
        "LLMTASKS_DATABASE_URL": url,
        "LLMTASKS_BROKER_URL": "memory://",
        "LLMTASKS_RESULT_URL": "cache+memory://",
    }
    (tmp_path / "celeryconfig.py").write_text(
        f"broker_url = 'memory://'\nresult_backend = 'cache+memory://'\nllmtasks_database_url = {url!r}\n"
        "task_create_missing_queues = True\n"
    )
    with app_in_this_process(tmp_path, environ, __name__) as app:
        app.conf.update(broker_url="memory://", result_backend="cache+memory://", llmtasks_database_url=url)
        install(app)
        yield app
        holdings.flush()


@pytest.fixture
def at(app: Celery) -> Station:
    return station(app)


def trace(app: Any, name: str, run_id: str, **request: Any) -> Any:
    """What a worker's child does with a message."""
    task = app.tasks[name]
    where = {"exchange": "", "routing_key": "celery", "priority": None}
    head = {"id": run_id, "task": name, "delivery_info": where, "hostname": "h", "is_eager": False, "retries": 0}
    return build_tracer(name, task, app=app)(run_id, [], {}, {**head, "headers": {}, **request})


def run_of(at: Station, run_id: str) -> Run:
    with at.database.reading() as connection:
        run = runs.get(connection, run_id)
    assert run is not None
    return run


def new_run(at: Station, name: str, **values: Any) -> NewRun:
    given = {"args": "[]", "kwargs": "{}", "envelope": '{"options": {}}', "queue": None, "priority": 5, **values}
    return NewRun(id=str(uuid.uuid4()), app=at.name, func_name=name, name=name, **given)


def test_message_that_cannot_be_sent_does_not_hold_up_the_others(app: Celery, at: Station) -> None:
    """Its run has failed and says why; its end is not told, as its queue is missing for that too."""
    app.conf.task_create_missing_queues = False
    app.amqp.queues.create_missing = False  # type: ignore[attr-defined]
    bad, good = new_run(at, "attempts_ok", queue="typo"), new_run(at, "attempts_ok")
    with at.database.transaction() as tx:
        for new in (bad, good):
            runs.open_run(tx, new, at.database.now())

    assert relay_due(at) == 2

    assert run_of(at, good.id).state is RunState.QUEUED
    run = run_of(at, bad.id)
    assert run.state is RunState.FAILED
    assert "cannot be sent" in str(run.reason)
    assert "typo" in str(run.reason)
    with at.database.transaction() as tx:
        outbox.put(tx, at.name, [bad.id], at.database.now(), DELIVER)
    relay_due(at)
    assert run_of(at, bad.id).delivered
    assert relay_due(at) == 0


def test_cancelled_run_of_a_plain_task_is_never_sent(app: Celery, at: Station) -> None:
    """Its function would run where a registered one is told its end."""
    new = new_run(at, "plain", envelope='{"options": {}, "handed": true}', schedule_id="sid")
    with at.database.transaction() as tx:
        runs.open_run(tx, new, at.database.now())
    cancel_run(at, new.id)
    with at.database.transaction() as tx:
        outbox.deliver(tx, at.name, new.id, at.database.now())

    with app.connection_for_write() as connection, connection.SimpleQueue("celery") as queue:
        queue.clear()
        relay_due(at)
        assert queue.qsize() == 0

    run = run_of(at, new.id)
    assert (run.state, run.delivered) == (RunState.CANCELLED, True)


@pytest.mark.parametrize("name", ["attempts_replace", "attempts_become_chain"])
def test_replacement_can_be_sent_until_it_is_claimed(app: Celery, at: Station, name: str) -> None:
    """Its message may be lost; cancelled meanwhile, its end is told with the replacement's links."""
    run_id = str(uuid.uuid4())

    trace(app, name, run_id, group="members", errbacks=[dict(app.tasks["attempts_ok"].si())])

    assert run_of(at, run_id).state is RunState.QUEUED
    with at.database.transaction() as tx:
        tx.execute(update(rows.runs).where(rows.runs.c.id == run_id).values(state=RunState.PENDING))
        outbox.put(tx, at.name, [run_id], at.database.now())
        (message,) = outbox.take_these(tx, [run_id], at.database.now())
    assert message.replacement is not None
    cancel_run(at, run_id)
    with at.database.transaction() as tx:
        outbox.deliver(tx, at.name, run_id, at.database.now())
        (message,) = outbox.take_these(tx, [run_id], at.database.now())
    with app.connection_for_write() as connection, connection.SimpleQueue("celery") as queue:
        queue.clear()
        publish(at, [message])
        assert queue.qsize() == 1
        told = queue.get(block=False)
    assert told.headers["id"] == run_id
    assert told.headers["group"] == "members"
    assert len(told.payload[2]["errbacks"]) == 1
    assert told.headers[sender.DELIVER_HEADER] in {1, "1"}


def test_replacement_is_owed_in_the_transaction_that_ends_the_attempt(
    app: Celery, at: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed after it leaves a message that any keeper sends."""
    monkeypatch.setattr("llmtasks.attempt.finishing.relay", lambda *_: None)
    run_id = str(uuid.uuid4())

    trace(app, "attempts_replace", run_id)

    assert run_of(at, run_id).state is RunState.PENDING
    assert relay_due(at) == 1
    assert run_of(at, run_id).state is RunState.QUEUED


def test_unspeakable_arguments_of_a_retry_fail_the_run(app: Celery, at: Station) -> None:
    """The attempt's end says what was wrong instead of leaving a run that nobody holds."""
    run_id = str(uuid.uuid4())

    trace(app, "attempts_retry_unspeakably", run_id)

    run = run_of(at, run_id)
    assert run.state is RunState.FAILED
    assert str(run.error).startswith("llmtasks.errors.InvalidParamsError: args[0] is")


def test_throws_may_be_one_class(app: Celery, at: Station) -> None:
    """As Celery itself takes it."""
    run_id = str(uuid.uuid4())

    trace(app, "attempts_throw", run_id)

    run = run_of(at, run_id)
    assert (run.state, run.attempts) == (RunState.FAILED, 1)


def _away(*_args: Any, **_kwargs: Any) -> None:
    raise BrokerUnavailableError("away")


def test_cancellation_that_cannot_be_told_is_no_failure(app: Any, at: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is away for a moment: a keeper has the cancellation told again."""
    new = new_run(at, "attempts_ok")
    with at.database.transaction() as tx:
        runs.open_run(tx, new, at.database.now())
    cancel_run(at, new.id)
    with monkeypatch.context() as patch:
        patch.setattr(app.backend, "mark_as_failure", _away)
        trace(app, "attempts_ok", new.id)
    assert app.AsyncResult(new.id).state == "PENDING"
    assert not run_of(at, new.id).delivered

    trace(app, "attempts_ok", new.id)

    holdings.flush()
    assert app.AsyncResult(new.id).state == "REVOKED"
    assert run_of(at, new.id).delivered


def test_retry_that_cannot_be_told_is_no_failure(app: Any, at: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is away when Celery stores RETRY: the run keeps its next attempt, and no FAILURE is stored."""
    run_id = str(uuid.uuid4())
    monkeypatch.setattr(app.backend, "mark_as_retry", _away)

    with pytest.warns(RuntimeWarning, match="Exception raised outside body"):
        trace(app, "attempts_fail", run_id)

    assert run_of(at, run_id).state is RunState.RETRYING
    assert app.AsyncResult(run_id).state == "PENDING"


def test_link_that_cannot_be_sent_is_no_failure(app: Any, at: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker is away when the chain goes on: the success is told again later, with the chain's next step."""
    run_id = str(uuid.uuid4())
    step = app.tasks["attempts_ok"].si().set(task_id="next")

    def away(*_args: Any, **_kwargs: Any) -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(app.amqp, "send_task_message", away)
        with pytest.warns(RuntimeWarning, match="Exception raised outside body"):
            trace(app, "attempts_ok", run_id, chain=[dict(step)])
    run = run_of(at, run_id)
    assert (run.state, run.delivered) == (RunState.SUCCEEDED, False)
    assert app.AsyncResult(run_id).state == "PENDING"

    trace(app, "attempts_ok", run_id, chain=[dict(step)])

    holdings.flush()
    assert app.AsyncResult(run_id).state == "SUCCESS"
    assert run_of(at, run_id).delivered


def test_start_that_cannot_be_told_is_no_failure(app: Any, at: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """track_started is a courtesy: the function runs all the same, and is told otherwise."""
    stored: list[str] = []
    real = app.backend.store_result

    def store(run_id: str, value: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        stored.append(state)
        if state == "STARTED":
            raise ConnectionError("away")
        return real(run_id, value, state, *args, **kwargs)

    monkeypatch.setattr(app.backend, "store_result", store)
    run_id = str(uuid.uuid4())

    trace(app, "attempts_tracked", run_id)

    assert stored == ["STARTED", "SUCCESS"]
    assert run_of(at, run_id).state is RunState.SUCCEEDED


def test_callback_is_over_when_it_has_been_called(app: Celery, at: Station) -> None:
    """That the end was told is in the ledger at once: a process that dies now makes nobody call it again."""
    run_id = str(uuid.uuid4())

    trace(app, "attempts_call_back", run_id)

    assert run_of(at, run_id).delivered
    assert calls.count(run_id) == 1


@pytest.mark.parametrize(("claims_before", "state"), [(0, RunState.SKIPPED), (1, RunState.WAITING)])
def test_periodic_run_that_was_put_back_waits(app: Any, at: Station, claims_before: int, state: RunState) -> None:
    """Only one that never started may be skipped where no slot is free: a worker that shuts down loses nothing."""
    now = at.database.now()
    schedule = Schedule(
        id=str(uuid.uuid4()), app=at.name, name="often", func_name="attempts_ok", kind="interval", every_us=60_000_000,
        anchor=now, next_run_at=now,
    )  # fmt: skip
    new = new_run(at, "attempts_ok", schedule_id=schedule.id, scheduled_for=now, schedule_slots=1)
    with at.database.transaction() as tx:
        schedules.put(tx, schedule, now)
        runs.open_run(tx, new, now)
        tx.execute(update(rows.runs).where(rows.runs.c.id == new.id).values(claim_no=claims_before))
        taken = slots.scopes(at.name, "attempts_ok", None, schedule.id, 1)
        assert slots.take(tx, taken, "another", now) is None

    trace(app, "attempts_ok", new.id)

    assert run_of(at, new.id).state is state
