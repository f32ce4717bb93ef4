"""why, on real processes: what a worker, a beat and a broker that really do something lead to."""

from collections.abc import Callable, Iterator

import pytest

from llmtasks.dispatch import Station, station
from llmtasks.states import RunState
from llmtasks.task import Task
from llmtasks.why import Explanation, explain
from tests.ledger import QUICK, Ledger, project_with
from tests.processes import CeleryProcess, Project
from tests.waiting import wait_until

pytestmark = [pytest.mark.redis, pytest.mark.slow]

TASKS = """
    import asyncio
    from llmtasks.registry import task_registry
    from tests.notebook import is_open, note

    @task_registry.register(name="hold", max_instances=1)
    async def hold():
        note("hold")
        await asyncio.sleep(600)

    @task_registry.register(name="fails", max_retries=1, retry_delay=600)
    def fails():
        raise ValueError("no such page")

    @task_registry.register(name="letter", queue="letters")
    async def letter():
        ...

    @task_registry.register(name="stubborn")
    async def stubborn():
        note("stubborn")
        while not is_open("stubborn"):
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                pass
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with project_with(tmp_path_factory.mktemp("why"), TASKS, **QUICK) as project:
        project.worker(concurrency=4)
        yield project


@pytest.fixture(scope="module", autouse=True)
def beat(project: Project) -> CeleryProcess:
    return project.beat()


@pytest.fixture
def at(project: Project) -> Station:
    return station(project.app)


def facts_of(found: Explanation) -> dict[str, object]:
    return {fact.name: fact.value for fact in found.facts}


def becomes(at: Station, task_id: str, condition: Callable[[Explanation], bool]) -> Explanation:
    """The explanation once it meets ``condition``."""
    last: list[Explanation] = []

    def met() -> bool:
        last[:] = [explain(at, task_id)]
        return condition(last[0])

    try:
        wait_until(met, 60, "the answer", interval=0.2)
    except AssertionError as error:
        raise AssertionError(f"{error}: {last}") from None
    return last[0]


def sent(func_name: str) -> str:
    """The id of a run that is recorded and sent."""
    task = Task(func_name=func_name, interval_minutes=600).save_sync()
    return task.execute_now_sync().id


def test_waiting_run_names_the_run_that_runs(project: Project, at: Station) -> None:
    """Holder and worker, and then the same for the holder itself."""
    ledger = Ledger(project)
    first = sent("hold")
    ledger.becomes(first, RunState.RUNNING)
    second, third = sent("hold"), sent("hold")
    ledger.becomes(second, RunState.WAITING)
    ledger.becomes(third, RunState.WAITING)

    holder, next_one, last = explain(at, first), explain(at, second), explain(at, third)

    assert "it runs on worker-1@test since " in holder.answer
    assert "last heartbeat" in facts_of(holder)
    assert next_one.answer == (
        f"run of 'hold': it waits for a slot of function 'hold', held by {first} on worker-1@test; 0 runs before it"
    )
    assert last.answer.endswith("; 1 run before it")
    for run_id in (third, second, first):
        Task.cancel_run_sync(run_id)
    cancelled = becomes(at, first, lambda found: found.state == "cancelled")
    assert "it was cancelled at " in cancelled.answer


def test_failed_attempt_says_when_the_next_one_is(at: Station) -> None:
    """With the error of the last."""
    run_id = sent("fails")

    found = becomes(at, run_id, lambda found: found.state == "retrying")
    Task.cancel_run_sync(run_id)

    assert found.answer.startswith("run of 'fails': attempt 1 failed, and the next is due at ")
    assert facts_of(found)["last error"] == "ValueError: no such page"


def test_run_in_a_queue_that_nobody_consumes_says_so(project: Project, at: Station) -> None:
    """Until a worker does; while all places are taken its queue's length says how long it waits."""
    run_id = sent("letter")
    unconsumed = becomes(at, run_id, lambda found: "which no live worker consumes" in found.answer)

    project.app.control.add_consumer("letters", destination=["worker-1@test"], reply=True, timeout=30)
    done = becomes(at, run_id, lambda found: found.state == "succeeded" and "Celery" not in found.answer)
    project.app.control.cancel_consumer("letters", destination=["worker-1@test"], reply=True, timeout=30)

    assert unconsumed.answer == "run of 'letter': it is in queue 'letters', which no live worker consumes"
    assert int(str(facts_of(unconsumed)["messages in the queue"])) >= 1
    assert facts_of(unconsumed)["consumed by"] == "none that answers"
    assert done.answer.startswith("run of 'letter': it succeeded in attempt 1 at ")


def test_run_behind_others_says_who_consumes_its_queue(project: Project, at: Station) -> None:
    """All places of the worker are taken: one more message is fetched, the rest waits in the queue."""
    ledger = Ledger(project)
    taken = [sent("stubborn") for _ in range(4)]
    ledger.notes("stubborn", 4)
    behind = [sent("fails") for _ in range(6)]
    for run_id in behind:
        ledger.becomes(run_id, RunState.QUEUED)

    found = explain(at, behind[-1])
    for run_id in [*behind, *taken]:
        Task.cancel_run_sync(run_id)
    asked = explain(at, taken[0])
    ledger.open_gate("stubborn")
    for run_id in taken:
        ledger.ends(run_id)

    assert found.answer.startswith("run of 'fails': it waits in queue 'celery' with ")
    assert found.answer.endswith(" messages, which worker-1@test consumes")
    assert facts_of(found)["consumed by"] == "worker-1@test"
    assert "; its worker was asked to cancel it " in asked.answer


def test_schedule_is_in_order_until_its_beat_dies(at: Station, beat: CeleryProcess) -> None:
    """A lease after the last heartbeat of the beat the answer says that none is alive."""
    task = Task(func_name="letter", interval_minutes=600).save_sync()
    assert task.id is not None

    in_order = becomes(at, task.id, lambda found: "but" not in found.answer)
    beat.kill()
    dead = becomes(at, task.id, lambda found: "no beat is alive" in found.answer)
    beat.start()
    alive = becomes(at, task.id, lambda found: "but" not in found.answer)

    assert in_order.answer.startswith("schedule 'letter' is next due at ")
    assert dead.answer.endswith(", but no beat is alive to fire it")
    assert str(facts_of(alive)["beats alive"]).startswith("beat@")
    assert facts_of(alive)["workers that know it"] == "worker-1@test"


def test_run_that_cannot_be_sent_says_that_the_broker_is_away(project: Project, at: Station) -> None:
    """The worker and the beat live and wait for it; when it is back the run runs."""
    project.broker.kill()
    run_id = sent("letter")

    away = explain(at, run_id)
    project.broker.start()
    back = becomes(at, run_id, lambda found: "which no live worker consumes" in found.answer)
    Task.cancel_run_sync(run_id)

    assert away.answer == "run of 'letter': its message waits in the outbox: the broker does not answer"
    assert "broker" in facts_of(away)
    assert "broker" not in facts_of(back)
