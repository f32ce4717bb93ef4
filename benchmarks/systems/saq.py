"""SAQ."""

from __future__ import annotations

from benchmarks.systems.system import System


class Saq(System):
    """At its defaults, but for 1,000 jobs at once and no time limit of 10 seconds where a job sleeps longer.

    Results are always stored, as JSON. It has no bulk call: 100 at once by ``asyncio.gather``.

    - ``concurrency``: https://saq-py.readthedocs.io/en/latest/autoapi/saq/worker/index.html
    - The ``hiredis`` extra: https://github.com/tobymao/saq#install
    """

    environment = "saq"
    APP = """
import asyncio
import os

from marks import END, START, mark
from saq import Queue

queue = Queue.from_url(f"redis://127.0.0.1:{os.environ['REDIS_PORT']}/0")


async def noop(ctx, *, number):
    mark(START, number)
    mark(END, number)
    return number


async def sleep(ctx, *, number, seconds):
    mark(START, number)
    await asyncio.sleep(seconds)
    mark(END, number)
    return number


settings = {"queue": queue, "functions": [noop, sleep], "concurrency": int(os.environ["SLOTS"])}


def options(number, seconds=None):
    if seconds is None:
        return {"number": number}
    return {"number": number, "seconds": seconds, **({"timeout": 0} if seconds > 9 else {})}


async def connect():
    await queue.connect()


async def send(name, *arguments):
    await queue.enqueue(name, **options(*arguments))


async def send_many(name, rows):
    for begin in range(0, len(rows), 100):
        await asyncio.gather(*(queue.enqueue(name, **options(*row)) for row in rows[begin : begin + 100]))
"""

    def command(self) -> list[str]:
        return ["-m", "saq", "app.settings"]

    def unfinished(self, count: int) -> int:
        return int(self.redis().zcard("saq:default:incomplete"))
