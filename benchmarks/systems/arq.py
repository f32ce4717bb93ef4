"""arq."""

from __future__ import annotations

from benchmarks.systems.system import System


class Arq(System):
    """At its defaults, but for 1,000 jobs at once, JSON, and no line in the log for each job.

    It looks for work twice a second (``poll_delay``), which is where its latency comes from; in between it is not
    idle as long as it finds something. Results are always stored. It has no bulk call: 100 at once by
    ``asyncio.gather``.

    - ``max_jobs``, ``poll_delay``, ``log_results``: https://arq-docs.helpmanual.io/#arq.worker.Worker
    - https://arq-docs.helpmanual.io/#custom-job-serializers
    """

    environment = "arq"
    looks = 0.5
    APP = """
import asyncio
import json
import os

from arq import create_pool
from arq.connections import RedisSettings
from marks import END, START, mark

settings = RedisSettings(port=int(os.environ["REDIS_PORT"]))
quiet = {"version": 1, "disable_existing_loggers": False, "loggers": {"arq": {"level": "WARNING"}}}


def dump(value):
    return json.dumps(value).encode()


async def noop(ctx, number):
    mark(START, number)
    mark(END, number)
    return number


async def sleep(ctx, number, seconds):
    mark(START, number)
    await asyncio.sleep(seconds)
    mark(END, number)
    return number


class Worker:
    functions = [noop, sleep]
    redis_settings = settings
    max_jobs = int(os.environ["SLOTS"])
    job_serializer, job_deserializer = dump, json.loads
    log_results = False


async def connect():
    global pool
    pool = await create_pool(settings, job_serializer=dump, job_deserializer=json.loads)


async def send(name, *arguments):
    await pool.enqueue_job(name, *arguments)


async def send_many(name, rows):
    for begin in range(0, len(rows), 100):
        await asyncio.gather(*(pool.enqueue_job(name, *row) for row in rows[begin : begin + 100]))
"""

    def command(self) -> list[str]:
        return ["-c", "from arq.cli import cli; cli()", "app.Worker", "--custom-log-dict", "app.quiet"]

    def unfinished(self, count: int) -> int:
        return int(self.redis().zcard("arq:queue"))
