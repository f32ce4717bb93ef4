"""One HTTP client for all runs of a worker: opened on its event loop before the first run, closed after the last.

A client keeps connections open, which belong to the loop that they were opened on. One for each run would connect, and
agree on encryption, anew each time; one made at import would belong to no loop that ever runs.

    LLMTASKS_POOL=asyncio LLMTASKS_IMPORTS=examples.shared_client celery worker
"""

from __future__ import annotations

import httpx

from llmtasks import on_worker_loop_start, on_worker_loop_stop, task_registry

client: httpx.AsyncClient


@on_worker_loop_start
async def open_client() -> None:
    """No run starts before this is done; an error here ends the worker, and says so."""
    global client
    client = httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=100, max_keepalive_connections=20))


@on_worker_loop_stop
async def close_client() -> None:
    """All runs have ended, or were put back for another worker."""
    await client.aclose()


@task_registry.register(name="count_words_of_page", timeout=60, retry_backoff=True)
async def count_words_of_page(url: str) -> int:
    """The number of words of a page."""
    response = await client.get(url)
    response.raise_for_status()
    return len(response.text.split())
