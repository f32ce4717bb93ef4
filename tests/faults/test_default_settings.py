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


def test_run_of_a_killed_worker_starts_again_within_twenty_seconds(
    project: Project, start_worker: Callable[..., CeleryProcess], ledger: Ledger
) -> None:
    """Without a beat, with another worker alive, and without waiting for the retry delay: nobody failed."""
    victim = start_worker()
    tasks: Any = project.app.tasks
    results = [tasks["passes"].delay(f"default {number}") for number in range(2)]
    for number in range(2):
        ledger.notes(f"default {number}", 1)
    start_worker()

    victim.kill()
    killed_at = time.monotonic()
    for number in range(2):
        ledger.notes(f"default {number}", 2)
    seconds = time.monotonic() - killed_at

    assert seconds <= 20
    for number in range(2):
        ledger.open_gate(f"default {number}")
    for result in results:
        assert result.get(timeout=60) == "done"
        run = ledger.ends(result.id)
        assert (run.attempts, run.losses) == (2, 1)
