"""What track_task_performance records on real runs, in every pool and on either side of the registration."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtasks.states import RunState
from tests.ledger import Ledger, project_with
from tests.processes import Project

pytestmark = [pytest.mark.redis, pytest.mark.slow]

TASKS = """
    import asyncio, time
    from llmtasks.metrics import track_task_performance
    from llmtasks.registry import task_registry

    def burn(seconds):
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    @task_registry.register(name="sync_below")
    @track_task_performance
    def sync_below():
        burn(0.1)

    @task_registry.register(name="async_below")
    @track_task_performance
    async def async_below():
        burn(0.1)
        await asyncio.sleep(0)
        return "done"

    @track_task_performance
    @task_registry.register(name="async_above")
    async def async_above(doc_id: str):
        burn(0.1)
        await asyncio.sleep(0)
        return doc_id

    @task_registry.register(name="untracked")
    def untracked():
        burn(0.01)
"""


@pytest.fixture(scope="module", params=["prefork", "threads"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    with project_with(folder, TASKS) as project:
        project.worker(pool=request.param)
        yield project


@pytest.mark.parametrize(
    ("name", "params"), [("sync_below", {}), ("async_below", {}), ("async_above", {"doc_id": "7"})]
)
def test_run_of_a_tracked_function_has_cpu_and_memory(project: Project, name: str, params: dict[str, str]) -> None:
    """The run's row says what its last attempt used."""
    sent = project.app.tasks[name].delay(**params)

    run = Ledger(project).ends(sent.id)

    assert run.state is RunState.SUCCEEDED, run
    assert run.cpu_seconds is not None
    assert 0.1 <= run.cpu_seconds < 5
    assert run.peak_memory is not None
    assert run.peak_memory > 10_000_000
    assert run.run_seconds is not None
    assert run.run_seconds >= 0.1


def test_run_of_another_function_has_wall_time_only(project: Project) -> None:
    """Measuring is asked for by the decorator."""
    sent = project.app.tasks["untracked"].delay()

    run = Ledger(project).ends(sent.id)

    assert (run.cpu_seconds, run.peak_memory) == (None, None)
    assert run.run_seconds is not None
