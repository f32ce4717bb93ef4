"""Cancelling a Task or one run, in every state it may be in; what waits for the run is told."""

import time
from typing import Any

import pytest
from celery import chain, chord
from celery.exceptions import TaskRevokedError

from llmtasks import Task
from llmtasks.dispatch import station
from llmtasks.states import RunState, ScheduleState
from tests.ledger import QUICK, Ledger, on_pools
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import asyncio
    import os
    import time

    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="sleeps", max_retries=0)
    async def sleeps(name):
        note(name, "began")
        try:
            await asyncio.sleep(120)
        except asyncio.CancelledError:
            note(name, f"cancelled {time.time()}")
            raise


    @task_registry.register(name="sleeps_in_group", max_retries=3, retry_delay=0)
    async def sleeps_in_group(name):
        async def child():
            note(name, "began")
            try:
                await asyncio.sleep(120)
            finally:
                note(name, "ended")

        async with asyncio.TaskGroup() as group:
            group.create_task(child())


    @task_registry.register(name="tidies_badly", max_retries=0)
    async def tidies_badly(name):
        note(name, "began")
        try:
            await asyncio.sleep(120)
        except asyncio.CancelledError:
            raise OSError("cannot tidy up")


    @task_registry.register(name="sleeps_sync", max_retries=3, retry_delay=0)
    def sleeps_sync(name):
        note(name, os.getpid())
        time.sleep(120)


    @task_registry.register(name="fails", max_retries=3, retry_delay=600)
    def fails(name):
        note(name)
        raise ConnectionError("try later")


    @task_registry.register(name="alone", max_retries=0, max_instances=1)
    async def alone(name):
        note(name)
        await gate(name)


    @task_registry.register(name="mark", max_retries=0)
    def mark(name, *_):
        note(name)


    @task_registry.register(name="tells", max_retries=0,
                            on_failure=lambda run, error: note("told", "failure"),
                            on_success=lambda run, result: note("told", "success"))
    async def tells(name):
        note(name)
        await asyncio.sleep(120)
"""

pytestmark = pytest.mark.redis


pool, project = on_pools(TASKS, "asyncio", "prefork", **QUICK)


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    return project.worker(concurrency=3)


def consume(project: Project, queue: str) -> None:
    """Have the worker take the messages of one more queue; one that has just begun does not hear of it at once."""
    wait_until(lambda: project.app.control.add_consumer(queue, reply=True), 30, f"a worker consumes {queue}")


def test_queued_run_that_is_cancelled_never_starts(project: Project, tasks: Any, ledger: Ledger) -> None:
    """Cancelled before any worker knew of it: its message ends it, and its result says REVOKED."""
    result = tasks["mark"].apply_async(("queued",), queue="aside-cancelled")

    assert Task.cancel_run_sync(result.id, "changed my mind") is None

    consume(project, "aside-cancelled")
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)
    run = ledger.ends(result.id)
    assert (run.state, run.reason, run.func_name) == (RunState.CANCELLED, "changed my mind", "mark")
    assert ledger.notes_now("queued") == []


def test_unknown_id_is_remembered_as_cancelled(tasks: Any, ledger: Ledger) -> None:
    """A cancellation may come before its run is sent."""
    Task.cancel_run_sync("sent-later")

    tasks["mark"].apply_async(("sent later",), task_id="sent-later")

    assert ledger.ends("sent-later").state is RunState.CANCELLED
    assert ledger.notes_now("sent later") == []


def test_running_coroutine_gets_cancelled_error_within_a_second(tasks: Any, ledger: Ledger) -> None:
    """CancelledError is raised at its await; the run is cancelled though it had no retry left; the result says so."""
    result = tasks["sleeps"].delay("running")
    ledger.notes("running", 1)

    cancelled_at = time.time()
    run = Task.cancel_run_sync(result.id, "enough")

    assert run is not None
    assert run.state is RunState.RUNNING
    assert run.cancel_requested_at is not None
    seen = ledger.notes("running", 2)[1]
    assert float(seen.split()[1]) - cancelled_at < 5  # a loaded machine; the poll is every 0.5 s
    run = ledger.ends(result.id)
    assert (run.state, run.reason) == (RunState.CANCELLED, "enough")
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)


def test_children_of_a_cancelled_coroutine_end_with_it(tasks: Any, ledger: Ledger) -> None:
    """A task group's tasks are cancelled too, and no retry follows."""
    result = tasks["sleeps_in_group"].delay("group")
    ledger.notes("group", 1)

    Task.cancel_run_sync(result.id)

    assert ledger.ends(result.id).state is RunState.CANCELLED
    assert ledger.notes_now("group") == ["began", "ended"]


def test_error_while_tidying_up_leaves_the_run_cancelled(tasks: Any, ledger: Ledger) -> None:
    """The error is recorded beside the cancellation."""
    result = tasks["tidies_badly"].delay("tidies")
    ledger.notes("tidies", 1)

    Task.cancel_run_sync(result.id, "enough")

    run = ledger.ends(result.id)
    assert (run.state, run.reason, run.error) == (RunState.CANCELLED, "enough", "OSError: cannot tidy up")


@pytest.mark.parametrize("pool", ["prefork"], indirect=True)
def test_running_sync_function_is_ended_with_its_process(tasks: Any, ledger: Ledger) -> None:
    """On prefork the child is ended, the run is not tried again, and the pool goes on."""
    result = tasks["sleeps_sync"].delay("sync")
    ledger.notes("sync", 1)

    Task.cancel_run_sync(result.id)

    run = ledger.ends(result.id)
    assert (run.state, run.reason) == (RunState.CANCELLED, "cancelled")
    wait_until(lambda: result.state == "REVOKED", 60, "the result says so")
    assert len(ledger.notes_now("sync")) == 1
    tasks["mark"].delay("after sync")
    ledger.notes("after sync", 1)


def test_run_that_waits_for_its_next_attempt_is_cancelled(tasks: Any, ledger: Ledger) -> None:
    """No further attempt follows, and who waits for the result is told."""
    result = tasks["fails"].delay("retrying")
    ledger.becomes(result.id, RunState.RETRYING)

    run = Task.cancel_run_sync(result.id)

    assert run is not None
    assert run.state is RunState.CANCELLED
    ledger.ends(result.id)
    assert result.state == "REVOKED"
    assert len(ledger.notes_now("retrying")) == 1


def test_run_that_waits_for_a_slot_is_cancelled(tasks: Any, ledger: Ledger) -> None:
    """It never starts, and the next in line gets the slot."""
    first = tasks["alone"].delay("slot 1")
    ledger.notes("slot 1", 1)
    second, third = tasks["alone"].delay("slot 2"), tasks["alone"].delay("slot 3")
    ledger.becomes(second.id, RunState.WAITING)
    ledger.becomes(third.id, RunState.WAITING)

    Task.cancel_run_sync(second.id)
    for number in (1, 2, 3):
        ledger.open_gate(f"slot {number}")

    assert ledger.ends(second.id).state is RunState.CANCELLED
    assert ledger.ends(third.id).state is RunState.SUCCEEDED
    assert ledger.ends(first.id).state is RunState.SUCCEEDED
    assert ledger.notes_now("slot 2") == []


def test_delayed_run_is_cancelled(tasks: Any, ledger: Ledger) -> None:
    """A run that the database keeps for later never starts."""
    result = tasks["mark"].apply_async(("delayed",), countdown=6)

    run = Task.cancel_run_sync(result.id)

    assert run is not None
    assert run.state is RunState.CANCELLED
    ledger.ends(result.id)
    assert result.state == "REVOKED"
    assert ledger.notes_now("delayed") == []


def test_cancelling_what_has_ended_changes_nothing(tasks: Any, ledger: Ledger) -> None:
    """A run that succeeded stays so."""
    result = tasks["mark"].delay("over")
    ledger.ends(result.id)

    run = Task.cancel_run_sync(result.id)

    assert run is not None
    assert run.state is RunState.SUCCEEDED


def test_cancelled_task_takes_its_runs_along(tasks: Any, ledger: Ledger) -> None:
    """Task.cancel ends the schedule, its running run and the one that has not started."""
    task = Task(func_name="sleeps", params={"name": "of task"}, interval_minutes=60, max_instances=1).save_sync()
    running = task.execute_now_sync()
    ledger.notes("of task", 1)
    waiting = task.execute_now_sync()
    ledger.becomes(waiting.id, RunState.WAITING)

    task.cancel_sync()

    assert Task.get_sync(str(task.id)).state is ScheduleState.CANCELLED
    assert ledger.ends(running.id).state is RunState.CANCELLED
    assert ledger.ends(waiting.id).state is RunState.CANCELLED
    assert len([line for line in ledger.notes_now("of task") if line == "began"]) == 1


def test_cancelled_run_calls_no_callback(tasks: Any, ledger: Ledger) -> None:
    """Neither on_failure nor on_success: somebody wanted it so."""
    result = tasks["tells"].delay("tells")
    ledger.notes("tells", 1)

    Task.cancel_run_sync(result.id)

    ledger.ends(result.id)
    assert ledger.notes_now("told") == []


def test_cancelled_chord_member_fails_the_body(tasks: Any, ledger: Ledger) -> None:
    """The chord's body gets the error instead of waiting for ever."""
    body = chord([tasks["sleeps"].s("member"), tasks["mark"].si("other member")])(tasks["mark"].si("body"))
    ledger.notes("member", 1)
    member = next(run for run in ledger.all("sleeps") if run.args == ["member"])

    Task.cancel_run_sync(member.id)

    wait_until(lambda: body.state == "FAILURE", 60, "the body has failed")
    assert isinstance(body.result, Exception)
    assert ledger.notes_now("body") == []


@pytest.mark.parametrize("state", ["queued", "running"])
def test_cancelled_link_of_a_chain_fails_the_rest(state: str, project: Project, tasks: Any, ledger: Ledger) -> None:
    """What should have come after it is told, whether it had begun or not."""
    name, queue = f"chained {state}", f"aside-chained-{state}"
    end: Any = chain(
        tasks["sleeps"].si(name).set(queue=queue), tasks["mark"].si(f"{name} after").on_error(tasks["mark"].si(name))
    ).apply_async()
    if state == "queued":
        Task.cancel_run_sync(end.parent.id)
        consume(project, queue)
    else:
        consume(project, queue)
        ledger.notes(name, 1)
        Task.cancel_run_sync(end.parent.id)

    ledger.ends(end.parent.id)
    wait_until(lambda: end.parent.state == "REVOKED", 60, "the result says so")
    wait_until(lambda: end.state in {"FAILURE", "REVOKED"}, 60, "the end of the chain is told")
    assert ledger.notes_now(f"{name} after") == []


def test_cancellation_survives_a_restart_of_every_worker(
    project: Project, worker: CeleryProcess, tasks: Any, ledger: Ledger
) -> None:
    """Workers forget revokes when they end; the database does not."""
    results = [tasks["mark"].apply_async((f"survivor {number}",), queue="aside-restart") for number in range(2)]
    results.append(tasks["mark"].apply_async(("survivor 2",), countdown=6))

    for result in results:
        Task.cancel_run_sync(result.id)
    worker.restart()
    consume(project, "aside-restart")

    for number, result in enumerate(results):
        assert ledger.ends(result.id).state is RunState.CANCELLED
        assert ledger.notes_now(f"survivor {number}") == []


def test_lost_run_with_a_cancel_request_ends_cancelled(
    project: Project, worker: CeleryProcess, tasks: Any, ledger: Ledger
) -> None:
    """A run whose worker was killed before it could obey is not run again."""
    result = tasks["sleeps_sync"].delay("lost")
    ledger.notes("lost", 1)

    worker.kill()
    Task.cancel_run_sync(result.id)
    worker.start()
    worker.wait_until_ready()

    run = ledger.ends(result.id)
    assert (run.state, run.reason) == (RunState.CANCELLED, "cancelled")
    assert len(ledger.notes_now("lost")) == 1
    assert station(project.app).settings.lease == 2
