"""Plain Celery 5.7 with its own pools, beside which every other system is measured."""

from __future__ import annotations

from typing import ClassVar

from benchmarks.systems.system import ASYNC_SLOTS, THREADS, System

#: Tasks are plain functions in all pools: Celery has no coroutines.
APP = """
import os
import time

from celery import Celery
from marks import END, START, mark

port = os.environ["REDIS_PORT"]
app = Celery("app", broker=f"redis://127.0.0.1:{port}/0", backend=f"redis://127.0.0.1:{port}/1")
app.conf.broker_connection_retry_on_startup = True


@app.task(name="noop")
def noop(number):
    mark(START, number)
    mark(END, number)
    return number


@app.task(name="sleep")
def sleep(number, seconds):
    mark(START, number)
    time.sleep(seconds)
    mark(END, number)
    return number


def connect():
    pass


def send(name, *arguments):
    app.tasks[name].delay(*arguments)


def send_many(name, rows):
    with app.producer_or_acquire() as producer, producer.batch(max_size=500):
        for row in rows:
            app.tasks[name].apply_async(row, producer=producer)
"""


class CeleryMessages(System):
    """What Celery leaves in Redis; with results there is a key for each ended task in database 1."""

    def unfinished(self, count: int) -> int:
        if self.results:
            return count - int(self.redis(1).dbsize())
        queues = [key for key in self.redis().scan_iter() if self.redis().type(key) == b"list"]
        return int(self.redis().hlen("unacked")) + sum(int(self.redis().llen(key)) for key in queues)


class Celery(CeleryMessages):
    """At its defaults, results in Redis. In bulk: kombu's ``producer.batch``.

    - ``gevent`` with 1,000 greenlets: https://docs.celeryq.dev/en/stable/userguide/concurrency/gevent.html
    - ``threads`` with 200: a thread for each of many tasks that wait
      (https://docs.celeryq.dev/en/stable/userguide/concurrency/index.html)
    - ``prefork`` with 20 processes; the default is one for each core, which is for tasks that compute
      (https://docs.celeryq.dev/en/stable/userguide/workers.html#concurrency)
    - Without gossip and mingle, which talk to other workers, and no line in the log for each task.
    """

    APP = APP
    SLOTS: ClassVar = {"prefork": 20, "threads": THREADS, "gevent": ASYNC_SLOTS}

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self.slots = self.SLOTS[pool]
        # The others run with the Celery that llmtasks runs with.
        self.environment = "celery-gevent" if pool == "gevent" else None

    def command(self) -> list[str]:
        options = ["-P", self._pool, "-c", str(self.slots), "-l", "WARNING", "--without-gossip", "--without-mingle"]
        return ["-m", "celery", "-A", "app", "worker", "-n", f"{next(self._numbers)}@benchmark", *options]
