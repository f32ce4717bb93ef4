"""Unique functions with real workers: who gets which run, what frees it, and what becomes of canvas."""

import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError

from llmtasks import Task
from llmtasks.beat import tick
from llmtasks.dispatch import station
from llmtasks.errors import DuplicateRunError
from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, project_with
from tests.processes import Project
from tests.waiting import wait_until

TASKS = """
    from llmtasks import task_registry
    from tests.notebook import gate, note, notes


    @task_registry.register(name="index", unique="document", max_retries=0)
    async def index(document, version=1, *, note_as=None):
        note(document, version)
        await gate(document)
        return f"{document} {version}"


    @task_registry.register(name="newest", unique=True, on_duplicate="replace", max_instances=1, max_retries=0)
    async def newest(name):
        note(name)
        await gate(name)
        return name


    @task_registry.register(name="strict", unique=True, on_duplicate="refuse", max_retries=0)
    async def strict(name):
        await gate(name)
        return name


    @task_registry.register(name="shaky", unique=True, bind=True, max_retries=1, retry_delay=0)
    async def shaky(self, name):
        note(name, self.request.retries)
        await gate(f"{name}{self.request.retries}")
        if self.request.retries == 0:
            raise ConnectionError("try again")
        return name


    @task_registry.register(name="hourly", unique=True, unique_for=3600)
    def hourly(name):
        note(name)
        return name


    @task_registry.register(name="countdown", unique=True, bind=True, max_retries=0)
    def countdown(self, number):
        note("countdown", number)
        if number:
            raise self.replace(countdown.s(number - 1))
        return "done"


    @task_registry.register(name="see", max_retries=0)
    def see(*values):
        note("see", values)
        return list(values)


    @task_registry.register(name="see_error", max_retries=0)
    def see_error(*values):
        note("see_error", values)
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A worker with room for all that waits at gates, whose lost runs are noticed soon."""
    with project_with(tmp_path_factory.mktemp("unique"), TASKS, **QUICK) as project:
        project.worker(pool="threads", concurrency=8)
        assert "index" in project.app.tasks  # this process knows the functions, whichever test comes first
        yield project


@pytest.fixture
def ledger(running: Project) -> Ledger:
    return Ledger(running)


def tasks(running: Project) -> Any:
    return running.app.tasks


def test_second_call_returns_the_run_that_is_there(running: Project, ledger: Ledger) -> None:
    """Positional or by keyword, with other values of what is not compared, now or delayed: one run, and its result."""
    index = tasks(running)["index"]
    first = index.delay("a")
    ledger.becomes(first.id, RunState.RUNNING)

    again = [
        index.delay(document="a"),
        index.delay("a", version=2),
        index.apply_async(("a",), countdown=60),
        *index.map_delay(["a", {"document": "a"}]),
    ]
    other = index.delay("b")
    ledger.open_gate("a")
    ledger.open_gate("b")

    assert {item.id for item in again} == {first.id}
    assert [item.get(timeout=60) for item in (first, *again, other)] == ["a 1"] * 6 + ["b 1"]
    ledger.ends(first.id)
    assert index.delay("a").id != first.id
    assert ledger.notes("a", 2) == ["1", "1"]


def test_execute_now_returns_the_run_that_is_there(running: Project, ledger: Ledger) -> None:
    """By hand or by a call, through whatever Task: what is compared are function and arguments."""
    index = tasks(running)["index"]
    task = Task(func_name="index", params={"document": "c"}, interval_minutes=600).save_sync()
    other = Task(func_name="index", params={"document": "c", "version": 3}, interval_minutes=600).save_sync()

    first = task.execute_now_sync()

    assert task.execute_now_sync().id == other.execute_now_sync().id == index.delay("c").id == first.id
    ledger.open_gate("c")
    assert ledger.ends(first.id).result == "c 1"
    task.cancel_sync()
    other.cancel_sync()


def test_replace_cancels_what_is_there(running: Project, ledger: Ledger) -> None:
    """The run that was there is told; with one place the new one starts when it has stopped."""
    newest = tasks(running)["newest"]
    first = newest.delay("d")
    ledger.notes("d", 1)

    second = newest.delay("d")

    with pytest.raises(TaskRevokedError, match=f"replaced: run {second.id} takes its place"):
        first.get(timeout=60)
    ledger.open_gate("d")
    assert second.get(timeout=60) == "d"
    assert ledger.ends(first.id).state is RunState.CANCELLED
    assert ledger.notes_now("d") == ["", ""]


def test_refuse_names_the_run_that_is_there(running: Project, ledger: Ledger) -> None:
    """The caller learns which one; another argument is another run."""
    strict = tasks(running)["strict"]
    first = strict.delay("e")
    ledger.becomes(first.id, RunState.RUNNING)

    with pytest.raises(DuplicateRunError, match=f"run like {first.id}, which is running") as raised:
        strict.delay("e")

    assert (raised.value.run_id, raised.value.state) == (first.id, "running")
    for name in "ef":
        ledger.open_gate(name)
    assert strict.delay("f").get(timeout=60) == "f"
    assert first.get(timeout=60) == "e"


def test_retry_keeps_the_run_unique(running: Project, ledger: Ledger) -> None:
    """Between the attempts and in the second one it is the run that it was."""
    shaky = tasks(running)["shaky"]
    first = shaky.delay("g")
    ledger.open_gate("g0")
    ledger.notes("g", 2)

    assert shaky.delay("g").id == first.id

    ledger.open_gate("g1")
    assert first.get(timeout=60) == "g"
    ledger.ends(first.id)
    assert shaky.delay("g").id != first.id


def test_period_counts_what_has_ended(running: Project, ledger: Ledger) -> None:
    """Within unique_for the result is the one that is there."""
    hourly = tasks(running)["hourly"]
    first = hourly.delay("h")
    ledger.ends(first.id)

    assert hourly.delay("h").get(timeout=60) == "h"

    assert hourly.delay("h").id == first.id
    assert ledger.notes_now("h") == [""]


def test_replacement_of_the_same_function_goes_on_under_the_id(running: Project, ledger: Ledger) -> None:
    """A run that gives its place to its own function is not in its own way."""
    first = tasks(running)["countdown"].delay(2)

    assert first.get(timeout=60) == "done"
    assert ledger.notes_now("countdown") == ["2", "1", "0"]


def test_duplicate_in_a_chain_ends_the_chain(running: Project, ledger: Ledger) -> None:
    """The step is skipped with its reason, and what follows is told; in a worker refusing raises nothing."""
    app = tasks(running)
    for name, letter in (("index", "i"), ("strict", "j")):
        there = app[name].delay(letter)
        ledger.becomes(there.id, RunState.RUNNING)

        steps = chain(app["see"].s(letter), app[name].si(letter), app["see"].s("after"))
        last = steps.apply_async(link_error=app["see_error"].s())

        with pytest.raises(TaskRevokedError, match=f"duplicate: the function is unique, and run {there.id} is running"):
            last.get(timeout=60)
        skipped = ledger.ends(last.parent.id)
        assert (skipped.state, skipped.func_name) == (RunState.SKIPPED, name)
        assert ledger.ends(last.parent.parent.id).state is RunState.SUCCEEDED
        ledger.open_gate(letter)
        assert there.get(timeout=60)
    wait_until(lambda: len(ledger.notes_now("see_error")) >= 2, 60, "errbacks")
    assert not any("after" in line for line in ledger.notes_now("see"))


def test_duplicate_in_a_chord_fails_its_body(running: Project, ledger: Ledger) -> None:
    """As a cancelled member does, once the other members have ended."""
    app = tasks(running)
    body = chord([app["index"].s("k"), app["index"].s("k"), app["index"].s("l")])(app["see"].s())
    for letter in "kl":
        ledger.open_gate(letter)

    with pytest.raises(ChordError, match="duplicate: the function is unique"):
        running.app.AsyncResult(body.id).get(timeout=60)  # a handle without parents: those would raise their own error


def test_duplicate_in_a_group_comes_to_its_end(running: Project, ledger: Ledger) -> None:
    """Its place in the group says of which run it is a duplicate; the others have their results."""
    index = tasks(running)["index"]
    first = index.delay("v")

    both = group(index.s("v", 2), index.s("w")).apply_async()

    with pytest.raises(TaskRevokedError, match=f"and run {first.id} is"):
        both.results[0].get(timeout=60)
    for letter in "vw":
        ledger.open_gate(letter)
    assert both.results[1].get(timeout=60) == "w 1"
    assert first.get(timeout=60) == "v 1"


def test_chain_and_chord_of_unique_functions_work(running: Project, ledger: Ledger) -> None:
    """What is no duplicate runs, with its links, its members and its body."""
    app = tasks(running)
    for letter in "mnop":
        ledger.open_gate(letter)

    steps = chain(app["index"].s("m"), app["see"].s(), app["hourly"].s())
    assert steps.apply_async().get(timeout=60) == ["m 1"]
    body = chord([app["index"].s(letter) for letter in "nop"])(app["hourly"].s())
    assert sorted(body.get(timeout=60)) == ["n 1", "o 1", "p 1"]
    app["index"].apply_async(("m", 2), link=app["see"].s("linked"))
    wait_until(lambda: any("'m 2', 'linked'" in line for line in ledger.notes_now("see")), 60, "the link was called")


def test_id_that_somebody_chose_comes_to_an_end(running: Project, ledger: Ledger) -> None:
    """Whoever asks for it by that id learns that it is a duplicate."""
    index = tasks(running)["index"]
    first = index.delay("q")

    second = index.apply_async(("q",), task_id="chosen")

    assert second.id == first.id
    with pytest.raises(TaskRevokedError, match=f"run {first.id} is"):
        index.AsyncResult("chosen").get(timeout=60)
    ledger.open_gate("q")
    assert first.get(timeout=60) == "q 1"


def test_instants_of_a_schedule_that_are_duplicates_are_skipped(running: Project, ledger: Ledger) -> None:
    """They name the run that somebody else asked for; once that has ended, the next instant runs."""
    first = tasks(running)["index"].delay("r")
    ledger.becomes(first.id, RunState.RUNNING)
    task = Task(func_name="index", params={"document": "r"}, interval_minutes=1 / 60, overlap="allow").save_sync()
    beat = running.beat()

    def mine(state: RunState) -> list[str | None]:
        return [run.reason for run in ledger.all("index") if run.schedule_id == task.id and run.state is state]

    wait_until(lambda: len(mine(RunState.SKIPPED)) >= 2, 60, "instants are skipped")
    assert set(mine(RunState.SKIPPED)) == {f"duplicate: the function is unique, and run {first.id} is running"}
    ledger.open_gate("r")
    wait_until(lambda: mine(RunState.SUCCEEDED), 60, "an instant ran")
    task.cancel_sync()

    latest = Task(func_name="newest", params={"name": "s"}, interval_minutes=1 / 60, overlap="allow").save_sync()
    by_hand = latest.execute_now_sync()
    reason = ledger.becomes(by_hand.id, RunState.CANCELLED).reason or ""
    successor = ledger.run(reason.removeprefix("replaced: run ").removesuffix(" takes its place"))
    assert successor is not None
    assert (successor.schedule_id, successor.scheduled_for is None) == (latest.id, False)
    latest.cancel_sync()
    beat.terminate()


def test_command_line_shows_what_became_of_it(running: Project, ledger: Ledger) -> None:
    """`run` gives the run that is there or says why not; `show` has the reason of one that was replaced."""

    def llmtasks(*arguments: str) -> Any:
        return running.run([sys.executable, "-m", "celery", "llmtasks", *arguments])

    first = tasks(running)["strict"].delay("t")
    refused = llmtasks("run", "strict", "--params", '{"name": "t"}')
    assert refused.returncode != 0
    assert f"run like {first.id}" in refused.stderr
    ledger.open_gate("t")
    replaced = tasks(running)["newest"].delay("u")
    second = tasks(running)["newest"].delay("u")
    ledger.ends(replaced.id)
    ledger.open_gate("u")

    shown = llmtasks("show", replaced.id)

    assert f"replaced: run {second.id} takes its place" in shown.stdout


@pytest.mark.parametrize("func_name", ["shaky", "newest"])
def test_two_schedules_of_one_function_that_are_due_at_once(running: Project, ledger: Ledger, func_name: str) -> None:
    """One tick decides about both: the first runs and the second is skipped, or the second replaces the first."""
    at = station(running.app)
    both = [
        Task(func_name=func_name, params={"name": f"{func_name}!"}, interval_minutes=600, next_run_at=datetime.now())
        for _ in range(2)
    ]
    for task in both:
        task.save_sync()

    claimed = tick.claim_due(at)

    mine = [run for run in ledger.all(func_name) if run.schedule_id in {task.id for task in both}]
    assert claimed.count == len(mine) == 2
    [sent] = claimed.messages
    [kept] = [run for run in mine if run.id == sent.run_id]
    [other] = [run for run in mine if run is not kept]
    if func_name == "newest":
        assert (other.state, claimed.cancelled) == (RunState.CANCELLED, [other.id])
        assert other.reason == f"replaced: run {kept.id} takes its place"
    else:
        assert (other.state, claimed.cancelled) == (RunState.SKIPPED, [])
        assert other.reason == f"duplicate: the function is unique, and run {kept.id} is pending"
    for task in both:
        task.cancel_sync()


def test_backfill_of_a_unique_function_runs_one_instant_at_a_time(running: Project, ledger: Ledger) -> None:
    """All of a schedule's runs are the same: the others are skipped, and the next backfill opens the next."""
    task = Task(func_name="index", params={"document": "x"}, interval_minutes=1).save_sync()
    task.pause_sync()
    end = datetime.now() - timedelta(minutes=10)
    begin = end - timedelta(minutes=3)

    [first] = task.backfill_sync(begin, end)

    left_out = [run for run in ledger.all("index") if run.schedule_id == task.id and run.state is RunState.SKIPPED]
    assert {run.reason for run in left_out} == {f"duplicate: the function is unique, and run {first.id} is pending"}
    ledger.open_gate("x")
    ledger.ends(first.id)
    [second] = task.backfill_sync(begin, end)
    assert second.id in {run.id for run in left_out}
    ledger.ends(second.id)
    task.cancel_sync()
