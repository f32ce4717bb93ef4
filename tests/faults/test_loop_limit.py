"""A worker whose event loop is blocked for longer than its limit ends, and others go on with its runs."""

from collections.abc import Callable
from typing import Any

import pytest

from llmtasks.states import RunState
from llmtasks.worker.watchdog import EXIT_CODE
from tests.ledger import QUICK, Ledger
from tests.processes import CeleryProcess, Project

TASKS = """
    import os
    import time

    from llmtasks import task_registry
    from tests.notebook import gate, note, notes


    @task_registry.register(name="passes", max_retries=1, retry_delay=0)
    async def passes(name):
        note(name, os.getpid())
        await gate(name)
        return os.getpid()


    @task_registry.register(name="blocks_once", max_retries=1, retry_delay=0)
    async def blocks_once(name):
        note(name, os.getpid())
        if len(notes(name)) == 1:
            time.sleep(600)
        return os.getpid()
"""

pytestmark = [pytest.mark.redis, pytest.mark.fault]


@pytest.fixture(scope="module")
def environ() -> dict[str, str]:
    return {**QUICK, "LLMTASKS_POOL": "asyncio", "LLMTASKS_LOOP_LIMIT": "2"}


@pytest.fixture
def tasks(project: Project) -> Any:
    return project.app.tasks


def test_runs_of_a_blocked_worker_end_on_another(
    start_worker: Callable[..., CeleryProcess], tasks: Any, ledger: Ledger
) -> None:
    """It says what blocks it and is gone; what it ran beside that, and the run itself, end on the second worker."""
    first = start_worker(concurrency=10)
    others = [tasks["passes"].delay("passes") for _ in range(4)]
    ledger.notes("passes", 4)
    blocker = tasks["blocks_once"].delay("blocks")
    ledger.notes("blocks", 1)
    second = start_worker(concurrency=10)

    assert first.process.wait(60) == EXIT_CODE
    ledger.open_gate("passes")

    assert f"by run {blocker.id} of blocks_once, longer than LLMTASKS_LOOP_LIMIT allows" in first.log()
    assert first.log().rstrip().endswith("time.sleep(600)")
    for result in [*others, blocker]:
        assert result.get(timeout=60) == second.pid
        run = ledger.ends(result.id)
        assert (run.state, run.attempts, run.losses) == (RunState.SUCCEEDED, 2, 1)
