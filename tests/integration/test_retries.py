"""Attempts: how many, when, with which arguments; the ledger keeps what Celery would keep in a message."""

from datetime import UTC, datetime
from typing import Any

import pytest
from celery.exceptions import MaxRetriesExceededError

from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, on_pools
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

TASKS = """
    import time
    from datetime import UTC, datetime, timedelta

    from celery.exceptions import Retry

    from llmtasks import task_registry
    from tests.notebook import note, notes


    @task_registry.register(name="fails", max_retries=2, retry_delay=0)
    async def fails(name):
        note(name, time.time())
        raise ConnectionError(f"no {name}")


    @task_registry.register(name="fails_slowly", max_retries=1, retry_delay=1.5)
    def fails_slowly(name):
        note(name, time.time())
        raise ConnectionError("again")


    @task_registry.register(name="fails_by_default")
    def fails_by_default():
        raise ConnectionError("again")


    @task_registry.register(name="backs_off", max_retries=2, retry_backoff=True, retry_backoff_max=1)
    def backs_off():
        note("backs_off", time.time())
        raise ConnectionError("again")


    @task_registry.register(name="throws", max_retries=3, retry_delay=0, throws=(KeyError,))
    async def throws(name):
        note(name)
        raise KeyError(name)


    @task_registry.register(name="autoretries", max_retries=5, retry_delay=0,
                            autoretry_for=(ConnectionError,), retry_kwargs={"max_retries": 1, "countdown": 0})
    async def autoretries(name):
        note(name)
        raise ConnectionError(name)


    @task_registry.register(name="counts_down", bind=True, max_retries=5, retry_delay=100)
    async def counts_down(self, number, *, unit="s"):
        note("counts_down", f"{number} {unit} {self.request.retries}")
        if number:
            raise self.retry(args=(number - 1,), kwargs={"unit": "min"}, countdown=0)
        return unit


    @task_registry.register(name="retries_quietly", bind=True, max_retries=2, retry_delay=0)
    def retries_quietly(self):
        note("retries_quietly")
        self.retry(throw=False)
        note("after retry")
        return "not the result"


    @task_registry.register(name="retries_once", bind=True, max_retries=5, retry_delay=0)
    def retries_once(self):
        note("retries_once")
        raise self.retry(max_retries=1)


    @task_registry.register(name="retries_with_error", bind=True, max_retries=1, retry_delay=0)
    async def retries_with_error(self):
        try:
            raise OSError("disk on fire")
        except OSError as error:
            note("retries_with_error")
            raise self.retry(exc=error, max_retries=2)


    @task_registry.register(name="retries_at", bind=True, max_retries=1)
    def retries_at(self):
        note("retries_at", time.time())
        if self.request.retries:
            return "in time"
        raise self.retry(eta=datetime.now(UTC) + timedelta(seconds=1.5))


    @task_registry.register(name="endless", bind=True, max_retries=0, retry_delay=0)
    def endless(self):
        note("endless")
        if len(notes("endless")) > 6:
            return "enough"
        raise self.retry(max_retries=8)
"""

pytestmark = pytest.mark.redis


pool, project = on_pools(TASKS, "asyncio", "prefork", **QUICK)


@pytest.fixture(scope="module", autouse=True)
def worker(project: Project) -> CeleryProcess:
    return project.worker()


def test_run_has_one_attempt_more_than_retries(tasks: Any, ledger: Ledger) -> None:
    """max_retries=2 means three attempts; the run fails with the last error and its traceback."""
    result = tasks["fails"].delay("luck")

    with pytest.raises(ConnectionError, match="no luck"):
        result.get(timeout=60)
    run = ledger.ends(result.id)
    assert (run.state, run.attempts, run.error) == (RunState.FAILED, 3, "ConnectionError: no luck")
    assert "async def" not in str(run.traceback)
    assert "in fails" in str(run.traceback)
    assert len(ledger.notes_now("luck")) == 3


def test_next_attempt_waits_for_the_retry_delay(tasks: Any, ledger: Ledger) -> None:
    """Between attempts the run is retrying, with a reason and the time of the next attempt."""
    result = tasks["fails_slowly"].delay("slow")

    run = ledger.becomes(result.id, RunState.RETRYING)
    assert run.reason == "attempt 1 ended: ConnectionError: again"
    assert run.next_attempt_at is not None
    assert run.next_attempt_at > datetime.now(UTC)
    ledger.ends(result.id)
    first, second = map(float, ledger.notes_now("slow"))
    assert second - first >= 1.5


def test_defaults_of_the_configuration_are_in_force(tasks: Any, ledger: Ledger) -> None:
    """A function that says nothing has TASK_CONFIG's three retries, 300 s apart."""
    result = tasks["fails_by_default"].delay()

    run = ledger.becomes(result.id, RunState.RETRYING)
    assert run.max_retries == 3
    assert run.next_attempt_at is not None
    assert 250 < (run.next_attempt_at - datetime.now(UTC)).total_seconds() <= 300


def test_backoff_stays_below_its_bound(tasks: Any, ledger: Ledger) -> None:
    """retry_backoff=True waits a random time of at most retry_backoff_max."""
    result = tasks["backs_off"].delay()

    run = ledger.ends(result.id)
    assert run.attempts == 3


def test_expected_errors_are_final(tasks: Any, ledger: Ledger) -> None:
    """What Celery's throws= names is not retried."""
    result = tasks["throws"].delay("expected")

    with pytest.raises(KeyError):
        result.get(timeout=60)
    assert ledger.ends(result.id).attempts == 1
    assert ledger.notes_now("expected") == [""]


def test_autoretry_keeps_to_its_own_count(tasks: Any, ledger: Ledger) -> None:
    """autoretry_for's retry_kwargs decide for the errors that it names."""
    result = tasks["autoretries"].delay("auto")

    with pytest.raises(ConnectionError, match="auto"):
        result.get(timeout=60)
    assert ledger.ends(result.id).attempts == 2
    assert len(ledger.notes_now("auto")) == 2


def test_retry_changes_arguments_and_delay(tasks: Any, ledger: Ledger) -> None:
    """self.retry(args=, kwargs=, countdown=) decides what the next attempt gets and when."""
    result = tasks["counts_down"].delay(2)

    assert result.get(timeout=60) == "min"
    assert ledger.notes_now("counts_down") == ["2 s 0", "1 min 1", "0 min 2"]
    run = ledger.ends(result.id)
    assert (run.args, run.kwargs, run.attempts) == ([0], {"unit": "min"}, 3)


def test_retry_without_throw_retries_after_the_return(tasks: Any, ledger: Ledger) -> None:
    """self.retry(throw=False) lets the function go on; what it returns is not the result."""
    result = tasks["retries_quietly"].delay()

    with pytest.raises(MaxRetriesExceededError):
        result.get(timeout=60)
    assert ledger.ends(result.id).attempts == 3
    assert len(ledger.notes_now("retries_quietly")) == 3
    assert len(ledger.notes_now("after retry")) == 2


def test_retry_may_lower_the_number_of_retries(tasks: Any, ledger: Ledger) -> None:
    """self.retry(max_retries=1) ends the run after the second attempt, and the registration adds none."""
    result = tasks["retries_once"].delay()

    with pytest.raises(MaxRetriesExceededError):
        result.get(timeout=60)
    assert ledger.ends(result.id).attempts == 2
    assert len(ledger.notes_now("retries_once")) == 2


def test_retry_gives_its_error_in_the_end(tasks: Any, ledger: Ledger) -> None:
    """self.retry(exc=error) fails with that error once its own count is used up."""
    result = tasks["retries_with_error"].delay()

    with pytest.raises(OSError, match="disk on fire"):
        result.get(timeout=60)
    assert ledger.ends(result.id).attempts == 3


def test_retry_at_an_instant(tasks: Any, ledger: Ledger) -> None:
    """self.retry(eta=) waits until then."""
    result = tasks["retries_at"].delay()

    assert result.get(timeout=60) == "in time"
    first, second = map(float, ledger.notes_now("retries_at"))
    assert second - first >= 1.4


def test_retry_may_raise_the_number_of_retries(tasks: Any, ledger: Ledger) -> None:
    """self.retry(max_retries=8) goes on where the registration says none."""
    result = tasks["endless"].delay()

    assert result.get(timeout=60) == "enough"
    assert ledger.ends(result.id).attempts == 7


def test_task_with_retries_of_its_own_overrides_the_function(project: Project, tasks: Any, ledger: Ledger) -> None:
    """A Task's max_retries counts, not its function's."""
    from llmtasks import Task

    task = Task(func_name="fails", params={"name": "task"}, interval_minutes=60, max_retries=0).save_sync()

    run = task.execute_now_sync()

    assert ledger.ends(run.id).attempts == 1
    wait_until(lambda: len(ledger.notes_now("task")) == 1, 60, "one attempt")
