"""Every run is recorded, its function called as Celery and asyncio promise, its end told to results and callbacks."""

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from llmtasks import Task
from llmtasks.errors import InvalidParamsError
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, project_with, queue_length
from tests.processes import CeleryProcess, Project

TASKS = """
    import asyncio
    import time

    import celery
    from celery.exceptions import Ignore, Reject

    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="add", max_retries=0)
    async def add(x, y=0):
        return x + y


    @task_registry.register(name="add_sync", max_retries=0)
    def add_sync(x, y=0):
        return x + y


    @task_registry.register(name="mark", max_retries=0)
    def mark(name, text=""):
        note(name, text)


    @task_registry.register(name="unspeakable", max_retries=3, retry_delay=0)
    def unspeakable():
        note("unspeakable")
        return object()


    @task_registry.register(name="gives_coroutine", max_retries=0)
    def gives_coroutine():
        return asyncio.sleep(0)


    @task_registry.register(name="gives_items", max_retries=0)
    def gives_items():
        async def items():
            yield 1
        return items()


    class Client:
        made = 0

        def __init__(self):
            Client.made += 1
            self.loop = asyncio.get_running_loop()
            self.lock = asyncio.Event()

    client = None


    @task_registry.register(name="use_client", max_retries=0)
    async def use_client():
        global client
        client = client or Client()
        # An event that another loop waited for would refuse this one.
        await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(set_event())), 5)
        return [id(asyncio.get_running_loop()) == id(client.loop), Client.made]


    async def set_event():
        asyncio.get_running_loop().call_soon(client.lock.set)
        await client.lock.wait()
        client.lock.clear()


    @task_registry.register(name="who", bind=True, max_retries=0)
    async def who(self):
        def seen():
            return [celery.current_task.request.id, self.request.id, celery.current_task.name]

        async def later(seconds):
            await asyncio.sleep(seconds)
            return seen()

        children = await asyncio.gather(later(0.01), later(0))
        return [seen(), *children, await asyncio.to_thread(seen)]


    @task_registry.register(name="ignores", max_retries=3)
    def ignores():
        raise Ignore("nothing to do")


    @task_registry.register(name="rejects", max_retries=3)
    def rejects():
        note("rejects")
        raise Reject("no good", requeue=False)


    @task_registry.register(name="rejects_once", bind=True, max_retries=0)
    def rejects_once(self, name):
        note(name, self.request.retries)
        from tests.notebook import notes
        if len(notes(name)) == 1:
            raise Reject("somebody else", requeue=True)
        return "done"


    async def tell(run, outcome):
        await asyncio.sleep(0)
        note("told", f"{run.id} {run.state} {run.attempt} {type(outcome).__name__} {outcome}")


    def tell_sync(run, outcome):
        note("told", f"{run.id} {run.state} {run.attempt} {type(outcome).__name__} {outcome}")


    def tell_wrong(run, outcome):
        raise LookupError("nobody to tell")


    @task_registry.register(name="watched", max_retries=2, retry_delay=0, on_failure=tell, on_success=tell_sync)
    async def watched(fail):
        if fail:
            raise ValueError("broken")
        return "fine"


    @task_registry.register(name="watched_sync", max_retries=0, on_failure=tell_sync, on_success=tell)
    def watched_sync(fail):
        if fail:
            raise ValueError("broken")
        return "fine"


    @task_registry.register(name="badly_watched", max_retries=0, on_failure=tell_wrong, on_success=tell_wrong)
    def badly_watched(fail):
        if fail:
            raise ValueError("broken")
        return "fine"


    @task_registry.register(name="secret", max_retries=0, redact=("key",))
    async def secret(key, text):
        return len(key)


    @celery.shared_task(name="plain")
    def plain(x):
        return x
"""

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with project_with(tmp_path_factory.mktemp("delivery"), TASKS, **QUICK) as project:
        yield project


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    """One child, so that runs start in the order in which the broker gives them out."""
    return project.worker(concurrency=1)


@pytest.mark.parametrize("name", ["add", "add_sync"])
def test_run_of_a_plain_delay_is_recorded_with_all_that_people_ask_about(name: str, tasks: Any, ledger: Ledger) -> None:
    """A run sent by .delay() is in the ledger with its arguments, result, times, worker and attempt."""
    before = datetime.now(UTC)

    result = tasks[name].delay(1, y=2)

    assert result.get(timeout=60) == 3
    run = ledger.ends(result.id)
    assert (run.func_name, run.state, run.args, run.kwargs, run.result) == (
        name, RunState.SUCCEEDED, [1], {"y": 2}, 3,
    )  # fmt: skip
    assert (run.attempts, run.attempt, run.error, run.reason) == (1, 1, None, None)
    assert run.worker == "worker-1@test"
    assert run.started_at is not None
    assert run.ended_at is not None
    assert before - timedelta(seconds=1) <= run.created_at <= run.started_at <= run.ended_at
    assert run.run_seconds is not None
    assert 0 <= run.run_seconds < 30


def test_plain_celery_tasks_stay_as_they_are(tasks: Any, ledger: Ledger) -> None:
    """A task that was not registered runs as ever, and the ledger does not hear of it."""
    result = tasks["plain"].delay(7)

    assert result.get(timeout=60) == 7
    assert ledger.run(result.id) is None


def test_revoked_run_is_recorded_as_cancelled(project: Project, tasks: Any, ledger: Ledger) -> None:
    """A run that Celery's revoke met before it started ends as cancelled and its result as REVOKED."""
    result = tasks["mark"].apply_async(("revoked",), queue="aside-revoked")
    result.revoke()

    project.app.control.add_consumer("aside-revoked", reply=True)

    run = ledger.ends(result.id)
    assert (run.state, run.reason, run.attempts) == (RunState.CANCELLED, "revoked", 0)
    assert result.state == "REVOKED"
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)
    assert ledger.notes_now("revoked") == []


def test_expired_run_is_recorded_as_skipped(project: Project, tasks: Any, ledger: Ledger) -> None:
    """A run whose message expired before a worker was free ends as skipped, and who waits for its result is told."""
    result = tasks["mark"].apply_async(("expired",), expires=0.1, queue="aside-expired")
    time.sleep(0.2)  # no condition to wait for: the clock itself

    project.app.control.add_consumer("aside-expired", reply=True)

    run = ledger.ends(result.id)
    assert (run.state, run.reason) == (RunState.SKIPPED, "expired before it started")
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)
    assert ledger.notes_now("expired") == []


def test_result_that_json_cannot_carry_fails_for_good_at_once(tasks: Any, ledger: Ledger) -> None:
    """The error names the value; the function is not called again, because that would not help."""
    result = tasks["unspeakable"].delay()

    with pytest.raises(Exception, match="result is <object object"):
        result.get(timeout=60)
    run = ledger.ends(result.id)
    assert (run.state, run.attempts) == (RunState.FAILED, 1)
    assert "InvalidParamsError" in str(run.error)
    assert len(ledger.notes_now("unspeakable")) == 1


@pytest.mark.parametrize(("name", "kind"), [("gives_coroutine", "coroutine"), ("gives_items", "async_generator")])
def test_sync_function_that_returns_what_nobody_awaits_is_an_error(
    name: str, kind: str, tasks: Any, ledger: Ledger
) -> None:
    """A coroutine or async iterator as a result is a failure that says what to write instead."""
    result = tasks[name].delay()

    with pytest.raises(TypeError, match=f"returned {kind}.*async def"):
        result.get(timeout=60)
    assert ledger.ends(result.id).state is RunState.FAILED


def test_clients_survive_from_run_to_run(tasks: Any) -> None:
    """A prefork child keeps one event loop, so that what a run made on it serves the next one."""
    first, second = tasks["use_client"].delay(), tasks["use_client"].delay()

    assert first.get(timeout=60) == [True, 1]
    assert second.get(timeout=60) == [True, 1]


def test_current_task_is_right_everywhere_in_a_coroutine(tasks: Any) -> None:
    """current_task and self.request are the run's in the coroutine, in tasks that it starts and in to_thread."""
    result = tasks["who"].delay()

    assert result.get(timeout=60) == [[result.id, result.id, "who"]] * 4


def test_function_that_raises_ignore_ends_as_skipped(tasks: Any, ledger: Ledger) -> None:
    """Ignore ends the run without a result, and the ledger says why."""
    result = tasks["ignores"].delay()

    run = ledger.ends(result.id)
    assert (run.state, run.reason, run.attempts) == (RunState.SKIPPED, "the function raised Ignore", 1)


def test_function_that_raises_reject_fails(tasks: Any, ledger: Ledger) -> None:
    """Reject without requeue is a failure, in the ledger and for who waits, after one attempt."""
    result = tasks["rejects"].delay()

    with pytest.raises(Exception, match="no good"):
        result.get(timeout=60)
    run = ledger.ends(result.id)
    assert (run.state, run.attempts) == (RunState.FAILED, 1)
    assert "no good" in str(run.error)
    assert len(ledger.notes_now("rejects")) == 1


def test_rejected_run_that_goes_back_runs_again_uncounted(tasks: Any, ledger: Ledger) -> None:
    """Reject(requeue=True) gives the message back; the next start is still the first attempt."""
    result = tasks["rejects_once"].delay("rejected once")

    assert result.get(timeout=60) == "done"
    assert ledger.notes_now("rejected once") == ["0", "0"]
    assert ledger.ends(result.id).attempts == 1


@pytest.mark.parametrize(
    ("name", "fail", "told"),
    [
        ("watched", True, "failed 3 ValueError broken"),
        ("watched", False, "succeeded 1 str fine"),
        ("watched_sync", True, "failed 1 ValueError broken"),
        ("watched_sync", False, "succeeded 1 str fine"),
    ],
)
def test_callback_is_called_once_after_the_last_attempt(
    name: str, fail: bool, told: str, tasks: Any, ledger: Ledger
) -> None:
    """on_failure and on_success, sync or async, get the run as it ended and its error or result, once."""
    result = tasks[name].delay(fail)

    ledger.ends(result.id)
    assert [line for line in ledger.notes_now("told") if line.startswith(result.id)] == [f"{result.id} {told}"]


@pytest.mark.parametrize(("fail", "state"), [(True, RunState.FAILED), (False, RunState.SUCCEEDED)])
def test_error_in_a_callback_is_recorded_and_changes_nothing_else(
    fail: bool, state: RunState, tasks: Any, ledger: Ledger
) -> None:
    """The run ends as its function did; the ledger's reason names the callback and its error."""
    result = tasks["badly_watched"].delay(fail)

    run = ledger.ends(result.id)
    assert run.state is state
    assert "tell_wrong raised LookupError: nobody to tell" in str(run.reason)


def test_secret_parameter_is_hidden_once_the_run_is_over(tasks: Any, ledger: Ledger) -> None:
    """redact= keeps a parameter out of the ledger, however it was passed, while the function gets it."""
    positional, named = tasks["secret"].delay("abc", "text"), tasks["secret"].delay(key="abc", text="text")

    assert (positional.get(timeout=60), named.get(timeout=60)) == (3, 3)
    assert ledger.ends(positional.id).args == ["***", "text"]
    assert ledger.ends(named.id).kwargs == {"key": "***", "text": "text"}


def test_arguments_that_do_not_fit_are_refused_where_they_are_sent(tasks: Any) -> None:
    """A wrong argument, or one that JSON cannot carry, is an error of the caller and names the value."""
    with pytest.raises(InvalidParamsError, match="'add' do not fit"):
        tasks["add"].delay()
    with pytest.raises(InvalidParamsError, match=r"kwargs\['y'\] is .*object"):
        tasks["add"].delay(1, y=object())


async def test_adelay_does_not_block_the_event_loop(tasks: Any) -> None:
    """The loop goes on while the broker is spoken to; what comes back is Celery's AsyncResult."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticker = asyncio.create_task(tick())
    result = await tasks["add"].adelay(1, 2)
    ticker.cancel()

    assert ticks > 1
    assert await asyncio.to_thread(result.get, timeout=60) == 3


def test_map_delay_sends_one_run_for_each_item(tasks: Any, ledger: Ledger) -> None:
    """Tuples are arguments, dicts keyword arguments, anything else the only argument; the results keep the order."""
    results = tasks["add"].map_delay([(1, 2), {"x": 3, "y": 4}, 5])

    assert [result.get(timeout=60) for result in results] == [3, 7, 5]
    assert [ledger.ends(result.id).state for result in results] == [RunState.SUCCEEDED] * 3


def test_long_countdown_is_kept_in_the_database(project: Project, tasks: Any, ledger: Ledger) -> None:
    """A delay over 5 s is no message in the broker; the run is pending until its time, and then runs."""
    sent = time.monotonic()

    counted = tasks["add"].apply_async((1, 2), countdown=5.5)
    timed = tasks["add"].apply_async((3, 4), eta=datetime.now(UTC) + timedelta(seconds=5.5))
    far = tasks["add"].apply_async((5, 6), countdown=3600)

    for result in (counted, timed, far):
        run = ledger.run(result.id)
        assert run is not None
        assert run.state is RunState.PENDING
    assert queue_length(project.broker) == 0
    assert (counted.get(timeout=60), timed.get(timeout=60)) == (3, 7)
    assert time.monotonic() - sent >= 5.4
    run = ledger.run(far.id)
    assert run is not None
    assert run.state is RunState.PENDING


def test_events_tell_of_each_message_of_a_batch(project: Project, ledger: Ledger) -> None:
    """``task-sent`` comes for each, as Flower and others expect it, although one message carries them all."""
    app, sent = project.app, list[Any]()
    task = Task(func_name="mark", params={"name": "batch"}, interval_minutes=1).save_sync()
    task.pause_sync()
    begin = datetime.now(UTC) - timedelta(minutes=10)

    with app.connection_for_read() as connection:
        receiver: Any = app.events.Receiver(connection, handlers={"task-sent": sent.append})
        with receiver.consumer_context() as (events, *_):
            events.drain_events(timeout=30)  # the worker's heartbeat; from now on it hears everything
            runs = task.backfill_sync(begin, begin + timedelta(minutes=2))
            while len(sent) < len(runs):
                events.drain_events(timeout=30)

    assert [event["uuid"] for event in sent] == [run.id for run in runs]
    assert {(event["name"], event["queue"], event["args"], event["kwargs"]) for event in sent} == {
        ("mark", "celery", "()", "{'name': 'batch'}")
    }
    for run in runs:
        ledger.ends(run.id)
