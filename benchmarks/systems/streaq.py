"""streaQ."""

from __future__ import annotations

from benchmarks.systems.system import System


class Streaq(System):
    """At its defaults, but for 1,000 tasks at once, JSON, and no line in the log for each task (``silent``).

    Results are always stored. In bulk: ``enqueue_many``.

    - ``concurrency``, ``serializer``: https://streaq.readthedocs.io/en/latest/worker.html
    - ``silent``, ``enqueue_many``: https://streaq.readthedocs.io/en/latest/task.html
    """

    environment = "streaq"
    APP = """
import asyncio
import json
import os

from marks import END, START, mark
from streaq import Worker

worker = Worker(
    redis_url=f"redis://127.0.0.1:{os.environ['REDIS_PORT']}/0",
    concurrency=int(os.environ["SLOTS"]),
    serializer=json.dumps,
    deserializer=json.loads,
)


@worker.task(silent=True)
async def noop(number):
    mark(START, number)
    mark(END, number)
    return number


@worker.task(silent=True)
async def sleep(number, seconds):
    mark(START, number)
    await asyncio.sleep(seconds)
    mark(END, number)
    return number


tasks = {"noop": noop, "sleep": sleep}


async def connect():
    await worker.__aenter__()


async def send(name, *arguments):
    await tasks[name].enqueue(*arguments)


async def send_many(name, rows):
    for begin in range(0, len(rows), 1000):
        await worker.enqueue_many([tasks[name].enqueue(*row) for row in rows[begin : begin + 1000]])
"""

    def command(self) -> list[str]:
        return ["-c", "from streaq.cli import cli; cli()", "run", "app:worker"]

    def unfinished(self, count: int) -> int:
        return int(self.redis().xlen("streaq:default:queues:normal"))
