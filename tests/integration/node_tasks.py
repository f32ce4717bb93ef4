"""Task functions of the worker nodes: pytest-celery copies this module to the worker."""

import asyncio
import os

from llmtasks import task_registry


@task_registry.register(name="nodes.doubled")
async def doubled(number: int) -> int:
    await asyncio.sleep(0.01)
    return number * 2


@task_registry.register(name="nodes.worker_pid")
async def worker_pid() -> int:
    return os.getppid()
