"""Dramatiq, with and without results."""

from __future__ import annotations

from benchmarks.systems.system import System

APP = """
import asyncio
import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from marks import END, START, mark

url = f"redis://127.0.0.1:{os.environ['REDIS_PORT']}/%d?max_connections=5000"
broker = RedisBroker(url=url % 0)
broker.add_middleware(AsyncIO())
if RESULTS:
    broker.add_middleware(Results(backend=RedisBackend(url=url % 1), store_results=True))
dramatiq.set_broker(broker)


@dramatiq.actor
async def noop(number):
    mark(START, number)
    mark(END, number)
    return number if RESULTS else None


@dramatiq.actor
async def sleep(number, seconds):
    mark(START, number)
    await asyncio.sleep(seconds)
    mark(END, number)
    return number if RESULTS else None


actors = {"noop": noop, "sleep": sleep}


def connect():
    pass


def send(name, *arguments):
    actors[name].send(*arguments)
"""


class Dramatiq(System):
    """At its defaults, with one process. Async actors run on one event loop, and each keeps a thread waiting for it.

    The threads may have a connection each, more than the 100 of redis-py. It has no bulk call: ``group(...).run()``
    sends one by one. Messages and results are JSON.

    - ``AsyncIO``: https://dramatiq.io/guide.html and https://dramatiq.io/reference.html#dramatiq.middleware.AsyncIO
    - ``--processes``, ``--threads``: https://dramatiq.io/advanced.html
    - Results: https://dramatiq.io/cookbook.html#results
    """

    environment = "dramatiq"
    # Longer and longer while there is nothing; it may be more than this.
    looks = 0.5

    def __init__(self, *, results: bool) -> None:
        self.results = results
        self.APP = f"RESULTS = {results}\n{APP}"

    def command(self) -> list[str]:
        return ["-m", "dramatiq", "app", "--processes", "1", "--threads", str(self.slots)]

    def unfinished(self, count: int) -> int:
        return int(self.redis().hlen("dramatiq:default.msgs"))
