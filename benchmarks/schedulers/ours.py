"""llmtasks: schedules and a ledger of runs in SQLite or PostgreSQL."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

from sqlalchemy import func, select

from benchmarks import stage
from benchmarks.arrivals import Arrival
from benchmarks.schedulers.scheduler import Firing, Planned, Scheduler, killed, locked
from llmtasks.store import schedules
from llmtasks.store.database import Database
from llmtasks.store.rows import runs
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Cron, Interval
from tests.ledger import queue_length
from tests.processes import Project
from tests.waiting import wait_until

#: Rows of one transaction while the table is filled.
SLICE = 5_000
#: Seconds in which a worker has to have run all messages of a cell.
WORK_TIMEOUT = 120
#: A function that leaves the id of each start in a file.
TASKS = """
import os
from celery import current_task
from llmtasks import task_registry

starts = os.open("starts.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


@task_registry.register(name="counted")
def counted(name):
    os.write(starts, f"{current_task.request.id}\\n".encode())
"""
#: Alembic migrates one database of a process at a time.
_migrating = threading.Lock()


class Ours(Scheduler):
    """At its defaults. Careful: ``misfire="all"``, so that an instant missed in an outage gets a run of its own too.

    The instant of a message is known from the ledger by its id. Messages with the same id are one run, which a worker
    starts once; so that nobody has to believe that, a real worker is given all messages, and its starts are counted.
    """

    def __init__(self, kind: str, *, careful: bool) -> None:
        super().__init__(careful=careful)
        self._kind = kind

    def open(self, stack: ExitStack) -> Project:
        url, self._server = stack.enter_context(stage.database_in(self.folder, self._kind))
        with _migrating:
            project = stage.project_on(self.folder, self.broker, url)
        project.tasks(TASKS, "counted")
        return project

    def plan(self, planned: Sequence[Planned]) -> None:
        rows = [self._row(item) for item in planned]
        with stage.database_of(self.project) as database:
            for begin in range(0, len(rows), SLICE):
                with database.transaction() as tx:
                    schedules.put_many(tx, rows[begin : begin + SLICE], datetime.now(UTC))

    def _row(self, item: Planned) -> Schedule:
        return Schedule(
            id=str(uuid.uuid4()),
            app=stage.APP,
            name=item.name,
            func_name="counted",
            args=[item.name],
            # Nobody runs what is sent here: by any other overlap policy the second instant would be skipped.
            options={"overlap": "allow"} | ({"misfire": "all"} if self.careful else {}),
            next_run_at=item.first,
            **trigger_columns(Cron("* * * * *") if item.every is None else Interval(item.every, item.first)),
        )

    def change(self, name: str) -> datetime | None:
        self.plan([Planned(name=name, every=timedelta(days=1), first=datetime.now(UTC))])
        return datetime.now(UTC)

    def lose_store(self, seconds: float) -> None:
        if self._server is None:
            locked(self.project.database_url, seconds)
        else:
            killed(self._server, seconds)

    def firings(self, arrivals: Sequence[Arrival], every: timedelta | None) -> list[Firing]:
        with stage.database_of(self.project) as database, database.reading() as connection:
            instants = dict(connection.execute(select(runs.c.id, runs.c.scheduled_for)).tuples().all())
        return [Firing(id=item.id, name=item.name, instant=instants[item.id], at=item.at) for item in arrivals]

    def starts(self, arrivals: Sequence[Arrival]) -> list[str]:
        worker = self.project.worker(pool="threads")
        with stage.database_of(self.project) as database:
            wait_until(
                lambda: not queue_length(self.broker) and not unfinished(database), WORK_TIMEOUT, "all runs ended"
            )
        worker.terminate()
        return (self.project.folder / "starts.txt").read_text("utf-8").split()


def unfinished(database: Database) -> int:
    """How many runs have not ended."""
    with database.reading() as connection:
        return connection.execute(select(func.count()).where(runs.c.ended_at.is_(None))).scalar_one()
