"""taskiq with taskiq-redis: the broker with acknowledgements, and the faster one without."""

from __future__ import annotations

from typing import ClassVar

from benchmarks.systems.system import System

APP = """
import asyncio
import os

import taskiq_redis
from marks import END, START, mark
from taskiq.serializers import JSONSerializer

port = os.environ["REDIS_PORT"]
results = taskiq_redis.RedisAsyncResultBackend(f"redis://127.0.0.1:{port}/1", serializer=JSONSerializer())
broker = getattr(taskiq_redis, BROKER)(f"redis://127.0.0.1:{port}/0").with_result_backend(results)


@broker.task(task_name="noop")
async def noop(number: int) -> int:
    mark(START, number)
    mark(END, number)
    return number


@broker.task(task_name="sleep")
async def sleep(number: int, seconds: float) -> int:
    mark(START, number)
    await asyncio.sleep(seconds)
    mark(END, number)
    return number


async def connect():
    await broker.startup()


async def send(name, *arguments):
    await broker.find_task(name).kiq(*arguments)


async def send_many(name, rows):
    task = broker.find_task(name)
    for begin in range(0, len(rows), 100):
        await asyncio.gather(*(task.kiq(*row) for row in rows[begin : begin + 100]))
"""


class Taskiq(System):
    """Results in Redis, as JSON. It has no bulk call: 100 at once by ``asyncio.gather``.

    - ``RedisStreamBroker``, which acknowledges a task when its result is saved, or ``ListQueueBroker`` "if you don't
      want acknowledges": https://github.com/taskiq-python/taskiq-redis#brokers
    - One process, 1,000 tasks at once: https://taskiq-python.github.io/guide/cli.html
    - With uvloop, which its worker uses where it is installed (``taskiq[uv]``).
    """

    environment = "taskiq"
    BROKERS: ClassVar = {"stream": "RedisStreamBroker", "list": "ListQueueBroker"}

    def __init__(self, broker: str) -> None:
        self.APP = f"BROKER = {self.BROKERS[broker]!r}\n{APP}"

    def command(self) -> list[str]:
        options = ["--workers", "1", "--max-async-tasks", str(self.slots), "--log-level", "WARNING"]
        return ["-m", "taskiq", "worker", "app:broker", *options]

    def unfinished(self, count: int) -> int:
        return count - int(self.redis(1).dbsize())
