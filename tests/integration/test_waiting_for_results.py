"""Waiting for results: who waits is told, whenever the run ended; and what a run sends knows its parent."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery.result import ResultSet

from tests.ledger import QUICK, Ledger, project_with
from tests.processes import Project
from tests.waiting import wait_until

pytestmark = pytest.mark.redis

TASKS = """
    from celery import shared_task

    from llmtasks import task_registry
    from tests.notebook import gate


    @task_registry.register(name="add", max_retries=0)
    def add(x, y=0):
        return x + y


    @task_registry.register(name="passes", max_retries=0)
    async def passes(name):
        await gate(name)
        return name


    @task_registry.register(name="parent", max_retries=0, bind=True)
    def parent(self, how):
        if how == "one":
            return [child.delay().id]
        return [result.id for result in child.map_delay([(), ()])]


    @task_registry.register(name="child", max_retries=0, bind=True)
    def child(self):
        return [self.request.root_id, self.request.parent_id]


    @shared_task(name="plain")
    def plain(x, y=0):
        return x + y
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with a worker."""
    with project_with(tmp_path_factory.mktemp("waiting"), TASKS, **QUICK) as project:
        project.worker()
        yield project


def test_run_is_subscribed_to_only_when_somebody_waits(project: Project) -> None:
    """Sending says nothing to the result backend; waiting does, and the result is pushed; both at once in threads."""
    tasks: Any = project.app.tasks
    name = f"pushed-{time.monotonic_ns()}"
    with redis.Redis(unix_socket_path=project.broker.socket, decode_responses=True) as client:

        def subscribed(result: Any) -> bool:
            return f"celery-task-meta-{result.id}" in client.pubsub_channels()

        control = tasks["plain"].delay(1)
        assert subscribed(control)

        results = [tasks["passes"].delay(name), *tasks["passes"].map_delay([name])]
        found: list[Any] = []
        assert not any(map(subscribed, results))

        def wait(result: Any) -> None:
            found.append(result.get(timeout=60))

        waiting = [threading.Thread(target=wait, args=(result,)) for result in results]
        for thread in waiting:
            thread.start()
        wait_until(lambda: all(map(subscribed, results)), 30, "both threads subscribed")
        Ledger(project).open_gate(name)
        for thread in waiting:
            thread.join(60)

        assert found == [name, name]
        assert control.get(timeout=60) == 1


def test_result_that_came_before_anybody_waits_is_there(project: Project) -> None:
    """``get``, ``ready``, ``join`` and a set of results find what was stored while nobody listened."""
    tasks: Any = project.app.tasks
    ledger = Ledger(project)
    one, many = tasks["add"].delay(1, 2), tasks["add"].map_delay([(1, 1), (2, 2)])
    for result in (one, *many):
        ledger.ends(result.id)

    assert one.get(timeout=10) == 3
    assert all(result.ready() for result in many)
    results: Any = ResultSet(many)
    assert results.join_native(timeout=10) == [2, 4]
    assert results.join(timeout=10) == [2, 4]
    again: Any = ResultSet(tasks["add"].map_delay([(3, 3), (4, 4)]))
    assert again.join_native(timeout=60) == [6, 8]


@pytest.mark.parametrize("how", ["one", "many"])
def test_runs_that_a_run_sends_know_their_parent(how: str, project: Project) -> None:
    """``root_id`` and ``parent_id`` are those of the run in whose function they were sent."""
    tasks: Any = project.app.tasks

    sent = tasks["parent"].delay(how)

    ids = sent.get(timeout=60)
    assert [child.id for child in sent.children] == ids
    for run_id in ids:
        assert project.app.AsyncResult(run_id).get(timeout=60) == [sent.id, sent.id]


def test_results_over_rpc_find_their_queue(tmp_path: Any) -> None:
    """A backend that has to prepare something before a message is sent still does: rpc declares a queue for replies."""
    with project_with(tmp_path, TASKS, **QUICK, LLMTASKS_RESULT_URL="rpc://") as project:
        project.worker()
        shown = project.python(
            """
            from celery import current_app
            current_app.loader.import_default_modules()
            from tasks import add

            print(add.delay(1, 2).get(timeout=50), [result.get(timeout=50) for result in add.map_delay([(1, 1), 2])])
            """
        )

    assert shown.strip() == "3 [2, 2]"


def test_parents_priority_is_inherited_where_the_app_says_so(tmp_path: Any) -> None:
    """Celery's ``task_inherit_parent_priority`` works for functions that have no priority of their own."""
    with project_with(tmp_path, TASKS, **QUICK) as project:
        configuration = (project.folder / "celeryconfig.py").read_text("utf-8")
        project.write("celeryconfig.py", f"{configuration}\ntask_inherit_parent_priority = True\n")
        project.worker()
        shown = project.python(
            """
            from celery import current_app
            current_app.loader.import_default_modules()
            from llmtasks.dispatch import find_run, station
            from tasks import add, parent

            for how, priority in (("one", 2), ("many", 3)):
                for run_id in parent.apply_async((how,), priority=priority).get(timeout=50):
                    current_app.AsyncResult(run_id).get(timeout=50)
                    print(find_run(station(), run_id).priority)
            """
        )

    assert shown.split() == ["2", "3", "3"]
