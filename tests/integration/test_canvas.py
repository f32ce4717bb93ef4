"""Chains, groups, chords, links and replacements of registered functions, through retries."""

from typing import Any

import pytest
from celery import chain, chord, group
from celery.result import AsyncResult

from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, on_pools
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import asyncio

    from celery import chain, group

    from llmtasks import task_registry
    from tests.notebook import note, notes


    @task_registry.register(name="add", max_retries=0)
    async def add(x, y):
        note("add", f"{x}+{y}")
        return x + y


    @task_registry.register(name="total", max_retries=0)
    def total(numbers):
        note("total", numbers)
        return sum(numbers)


    @task_registry.register(name="shaky", bind=True, max_retries=2, retry_delay=0)
    async def shaky(self, name, value):
        note(name, self.request.retries)
        if len(notes(name)) < 3:
            raise ConnectionError("try again")
        return value


    @task_registry.register(name="breaks", max_retries=1, retry_delay=0)
    def breaks(*values):
        note("breaks", values)
        raise ValueError("broken")


    @task_registry.register(name="see", max_retries=0)
    def see(*values):
        note("see", values)
        return list(values)


    @task_registry.register(name="see_error", max_retries=0)
    def see_error(*values):
        note("see_error", [str(value) for value in values])


    @task_registry.register(name="step_by_step", bind=True, max_retries=0)
    def step_by_step(self, number):
        note("step_by_step", number)
        if number == 0:
            return "arrived"
        raise self.replace(step_by_step.s(number - 1))


    @task_registry.register(name="becomes_chain", bind=True, max_retries=0)
    async def becomes_chain(self, x):
        return self.replace(chain(add.s(x, 1), add.s(10)))


    @task_registry.register(name="becomes_group", bind=True, max_retries=0)
    def becomes_group(self, count):
        return self.replace(group(add.s(number, 1) for number in range(count)))


    @task_registry.register(name="becomes_shaky", bind=True, max_retries=0)
    async def becomes_shaky(self, name):
        return self.replace(shaky.s(name, "came through"))
"""

pytestmark = pytest.mark.redis


pool, project = on_pools(TASKS, "asyncio", "prefork", **QUICK)


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    return project.worker()


def test_chain_passes_results_on_through_retries(tasks: Any, ledger: Ledger) -> None:
    """Each link gets the result before it, also where that needed three attempts; none is called too often."""
    result: Any = chain(tasks["add"].s(1, 1), tasks["shaky"].si("chained", 5), tasks["add"].s(10)).apply_async()

    assert result.get(timeout=60) == 15
    assert ledger.notes_now("chained") == ["0", "1", "2"]
    assert ledger.ends(result.id).state is RunState.SUCCEEDED
    assert ledger.ends(result.parent.id).attempts == 3


def test_group_gives_all_results_in_order(tasks: Any) -> None:
    """The results of a group come in the order of its members, whatever the order of their ends."""
    result = group(tasks["shaky"].s("grouped", 0), *(tasks["add"].s(number, 0) for number in range(1, 6)))()

    assert result.get(timeout=60) == [0, 1, 2, 3, 4, 5]


def test_chord_calls_its_body_once_with_all_results(tasks: Any, ledger: Ledger) -> None:
    """The body starts after the last member, also where members needed retries, and starts once."""
    members = [tasks["shaky"].s(f"member {number}", number) for number in range(3)]

    result = chord(members)(tasks["total"].s())

    assert result.get(timeout=60) == 3
    ledger.ends(result.id)
    assert ledger.notes_now("total").count("[0, 1, 2]") == 1


def test_chord_with_a_failed_member_fails_its_body(tasks: Any, ledger: Ledger) -> None:
    """The body is not called; its result is the error, and its errback hears of it."""
    body = tasks["total"].s().on_error(tasks["see_error"].s("chord"))

    result = chord([tasks["add"].s(100, 1), tasks["breaks"].s("member")])(body)

    wait_until(lambda: result.state == "FAILURE", 60, "the chord's body has failed")
    assert "broken" in str(result.result)
    wait_until(lambda: any("chord" in line for line in ledger.notes_now("see_error")), 60, "the errback was called")
    assert ledger.notes_now("breaks").count("('member',)") == 2


def test_chain_in_a_chord_in_a_chain(tasks: Any) -> None:
    """Nested canvas comes through as in plain Celery."""
    inner = chord([chain(tasks["add"].s(1, 1), tasks["add"].s(1)), tasks["add"].s(2, 2)], tasks["total"].s())

    result = chain(inner, tasks["add"].s(100)).apply_async()

    assert result.get(timeout=60) == 107


def test_link_is_called_once_after_retries(tasks: Any, ledger: Ledger) -> None:
    """A link gets the result when the last attempt succeeded, not before and not twice."""
    result = tasks["shaky"].apply_async(("linked", "value"), link=tasks["see"].s("linked"))

    assert result.get(timeout=60) == "value"
    assert ledger.notes_now("linked") == ["0", "1", "2"]
    wait_until(lambda: "('value', 'linked')" in ledger.notes_now("see"), 60, "the link was called")
    ledger.ends(result.id)
    assert ledger.notes_now("see").count("('value', 'linked')") == 1


def test_link_error_is_called_once_after_the_last_attempt(tasks: Any, ledger: Ledger) -> None:
    """An errback is sent when no attempt is left."""
    result = tasks["breaks"].apply_async(("errback",), link_error=tasks["see_error"].si("errback"))

    with pytest.raises(ValueError, match="broken"):
        result.get(timeout=60)
    wait_until(lambda: "['errback']" in ledger.notes_now("see_error"), 60, "the errback was called")
    ledger.ends(result.id)
    assert ledger.notes_now("see_error").count("['errback']") == 1
    assert ledger.notes_now("breaks").count("('errback',)") == 2


def test_delayed_run_keeps_its_links(tasks: Any, ledger: Ledger) -> None:
    """A run that waits in the database for its time has its link when it comes back."""
    result = tasks["add"].apply_async((20, 2), countdown=5.2, link=tasks["see"].s("delayed"))

    assert result.get(timeout=60) == 22
    wait_until(lambda: "(22, 'delayed')" in ledger.notes_now("see"), 60, "the link was called")


def test_replaced_run_ends_as_what_replaced_it(tasks: Any, ledger: Ledger) -> None:
    """self.replace by the same function, three times over: one id, one result, one run in the ledger."""
    result = tasks["step_by_step"].delay(3)

    assert result.get(timeout=60) == "arrived"
    assert ledger.notes_now("step_by_step") == ["3", "2", "1", "0"]
    run = ledger.ends(result.id)
    assert (run.state, run.attempts, run.args, run.result) == (RunState.SUCCEEDED, 1, [0], "arrived")


def test_replacement_has_retries_of_its_own(tasks: Any, ledger: Ledger) -> None:
    """What takes a run's place starts at its first attempt and has its own function's retries."""
    result = tasks["becomes_shaky"].delay("replacement")

    assert result.get(timeout=60) == "came through"
    assert ledger.notes_now("replacement") == ["0", "1", "2"]
    run = ledger.ends(result.id)
    assert (run.func_name, run.attempts) == ("shaky", 3)


def test_run_replaced_by_a_chain_ends_with_the_chains_result(tasks: Any, ledger: Ledger) -> None:
    """The last task of the chain takes the run's id, its result and its links."""
    result = tasks["becomes_chain"].apply_async((5,), link=tasks["see"].s("after chain"))

    assert result.get(timeout=60) == 16
    wait_until(lambda: "(16, 'after chain')" in ledger.notes_now("see"), 60, "the link was called")
    run = ledger.ends(result.id)
    assert (run.func_name, run.state, run.result) == ("add", RunState.SUCCEEDED, 16)


def test_run_replaced_by_a_group_ends_with_all_its_results(tasks: Any) -> None:
    """Celery gathers the group's results under the run's id."""
    result: AsyncResult[Any] = tasks["becomes_group"].delay(3)

    assert result.get(timeout=60) == [1, 2, 3]
