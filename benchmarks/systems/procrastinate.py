"""procrastinate, whose tasks are rows in PostgreSQL."""

from __future__ import annotations

import psycopg

from benchmarks.peers import PeerUnavailableError
from benchmarks.systems.system import System


class Procrastinate(System):
    """At its defaults, but for 1,000 jobs at once. It has no results: a job keeps its state. In bulk: ``batch_defer``.

    PostgreSQL runs without fsync here, which is faster than it would be in earnest. What a killed worker ran stays as
    it was until the application calls ``get_stalled_jobs`` and ``retry_job``, which is no default.

    - ``--concurrency``: https://procrastinate.readthedocs.io/en/stable/howto/basics/worker.html
    - ``batch_defer``: https://procrastinate.readthedocs.io/en/stable/howto/basics/batch_defer.html
    - Stalled jobs: https://procrastinate.readthedocs.io/en/stable/howto/production/retry_stalled_jobs.html
    """

    environment = "procrastinate"
    results = False
    APP = """
import asyncio
import os

from marks import END, START, mark
from procrastinate import App, PsycopgConnector

app = App(connector=PsycopgConnector(conninfo=os.environ["CONNINFO"]))


@app.task(name="noop")
async def noop(number):
    mark(START, number)
    mark(END, number)
    return number


@app.task(name="sleep")
async def sleep(number, seconds):
    mark(START, number)
    await asyncio.sleep(seconds)
    mark(END, number)
    return number


tasks = {"noop": noop, "sleep": sleep}
names = ("number", "seconds")


async def connect():
    await app.open_async()


async def send(name, *arguments):
    await tasks[name].defer_async(**dict(zip(names, arguments)))


async def send_many(name, rows):
    for begin in range(0, len(rows), 1000):
        await tasks[name].batch_defer_async(*(dict(zip(names, row)) for row in rows[begin : begin + 1000]))
"""

    def lay_out(self) -> None:
        if self.place.servers.postgresql is None:
            raise PeerUnavailableError("left out: PostgreSQL's programs are not here")
        super().lay_out()
        url = self.place.servers.postgresql.create_database()
        self._conninfo = url.replace("+psycopg", "")
        self.run("-m", "procrastinate", "--app", "app.app", "schema", "--apply")
        self._connection = psycopg.connect(self._conninfo, autocommit=True)

    def environ(self) -> dict[str, str]:
        return {**super().environ(), "CONNINFO": self._conninfo}

    def command(self) -> list[str]:
        options = ["worker", "--concurrency", str(self.slots)]
        return ["-m", "procrastinate", "--log-level", "warning", "--app", "app.app", *options]

    def unfinished(self, count: int) -> int:
        query = "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
        row = self._connection.execute(query).fetchone()
        assert row is not None
        return int(row[0])
