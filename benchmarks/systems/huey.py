"""huey."""

from __future__ import annotations

from benchmarks.systems.system import THREADS, System


class Huey(System):
    """Plain functions on 200 threads: it refuses coroutine functions. Not durable: what it took from the queue is gone.

    Results are stored. Messages are pickled, it brings nothing else. It has no bulk call: ``map`` sends one by one.

    - A connection for each thread, more than the 100 of redis-py: https://huey.readthedocs.io/en/latest/api.html#RedisHuey
    - ``-k thread -w``: https://huey.readthedocs.io/en/latest/consumer.html
    """

    environment = "huey"
    slots = THREADS
    APP = """
import os
import time

from huey import RedisHuey
from marks import END, START, mark

huey = RedisHuey("benchmark", url=f"redis://127.0.0.1:{os.environ['REDIS_PORT']}/0?max_connections=1000")


@huey.task()
def noop(number):
    mark(START, number)
    mark(END, number)
    return number


@huey.task()
def sleep(number, seconds):
    mark(START, number)
    time.sleep(seconds)
    mark(END, number)
    return number


tasks = {"noop": noop, "sleep": sleep}


def connect():
    pass


def send(name, *arguments):
    tasks[name](*arguments)
"""

    def command(self) -> list[str]:
        return ["-m", "huey.bin.huey_consumer", "app.huey", "-k", "thread", "-w", str(self.slots), "-q"]

    def unfinished(self, count: int) -> int:
        return count - int(self.redis().hlen("huey.results.benchmark"))
