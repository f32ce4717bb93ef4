"""The promise about killed workers at the settings that people have: nothing is made quick here."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.ledger import Ledger
from tests.processes import CeleryProcess, Project

TASKS = """
    import os

    from llmtasks import task_registry
    from tests.notebook import gate, note


    @task_registry.register(name="passes", max_retries=3, retry_delay=300)
    async def passes(name):
        note(name, os.getpid())
        await gate(name)
        return "done"
"""

pytestmark = [pytest.mark.redis, pytest.mark.fault, pytest.mark.slow]


@pytest.fixture(scope="module")
def environ() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("pool", ["asyncio", "prefork"])
def test_run_of_a_killed_worker_starts_again_within_twenty_seconds(
    pool: str, project: Project, start_worker: Callable[..., CeleryProcess], ledger: Ledger
) -> None:
    """Without a beat, with another worker alive, and without waiting for the retry delay: nobody failed."""
    victim = start_worker(pool=pool)
    tasks: Any = project.app.tasks
    names = [f"{pool} {number}" for number in range(2)]
    results = [tasks["passes"].delay(name) for name in names]
    for name in names:
        ledger.notes(name, 1)
    start_worker(pool=pool)

    victim.kill()
    killed_at = time.monotonic()
    for name in names:
        ledger.notes(name, 2)
    seconds = time.monotonic() - killed_at

    assert seconds <= 20
    for name in names:
        ledger.open_gate(name)
    for result in results:
        assert result.get(timeout=60) == "done"
        run = ledger.ends(result.id)
        assert (run.attempts, run.losses) == (2, 1)
