"""Task systems to measure side by side: a class each, with the same few methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.systems.arq import Arq
from benchmarks.systems.celery import Celery
from benchmarks.systems.dramatiq import Dramatiq
from benchmarks.systems.huey import Huey
from benchmarks.systems.ours import Ours
from benchmarks.systems.procrastinate import Procrastinate
from benchmarks.systems.saq import Saq
from benchmarks.systems.streaq import Streaq
from benchmarks.systems.system import System
from benchmarks.systems.taskiq import Taskiq

OURS: dict[str, Callable[[], System]] = {
    "llmtasks-asyncio": partial(Ours, "asyncio"),
    "llmtasks-asyncio-off": partial(Ours, "asyncio", recorded=False),
    "llmtasks-threads": partial(Ours, "threads"),
    "llmtasks-prefork": partial(Ours, "prefork"),
}
CELERY: dict[str, Callable[[], System]] = {
    f"celery-{pool}": partial(Celery, pool) for pool in ("prefork", "threads", "gevent")
}
PEERS: dict[str, Callable[[], System]] = {
    "taskiq": partial(Taskiq, "stream"),
    "taskiq-list": partial(Taskiq, "list"),
    "arq": Arq,
    "saq": Saq,
    "streaq": Streaq,
    "dramatiq": partial(Dramatiq, results=True),
    "dramatiq-no-results": partial(Dramatiq, results=False),
    "huey": Huey,
    "procrastinate": Procrastinate,
}
SYSTEMS = {**OURS, **CELERY, **PEERS}
