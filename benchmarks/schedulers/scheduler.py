"""What all schedulers have in common here: a folder, a broker, and the same few methods."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar, Self

from benchmarks.arrivals import Arrival
from benchmarks.peers import python_of
from tests.processes import CeleryProcess, Project
from tests.servers import PostgreSQL, Valkey, valkey

MINUTE = timedelta(minutes=1)
#: The task that all schedules name. Nobody runs it: messages are counted in the queue.
TASK = "recorded"
#: Seconds that writing the schedules may take.
PLAN_TIMEOUT = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A schedule to write; its message has its name as only argument."""

    name: str
    #: None is every minute, by what the scheduler has for cron.
    every: timedelta | None
    #: When it is due first.
    first: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """A message and the instant that it is for."""

    id: str
    name: str
    instant: datetime
    at: datetime


class Scheduler(ABC):
    """One scheduler with a broker and a store of its own in a temporary folder, between ``with`` and its end.

    Attributes:
        broker: The Valkey server that receives the messages.
        project: The folder with the Celery configuration in which its beats run.
        careful: Whether it is set up to lose and double as little as it can, or to be as fast as it can.
    """

    #: Whether the schedules are in something that can be away while beat is there.
    has_store: ClassVar[bool] = True
    broker: Valkey
    project: Project

    def __init__(self, *, careful: bool) -> None:
        self.careful = careful

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(prefix="llmtasks-benchmark-", ignore_cleanup_errors=True)
            self.folder = Path(stack.enter_context(folder))
            self.broker = stack.enter_context(valkey(self.folder / "broker", unix=True))
            self.project = self.open(stack)
            stack.callback(self.project.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @abstractmethod
    def open(self, stack: ExitStack) -> Project:
        """Start the store; returns the project."""

    @abstractmethod
    def plan(self, planned: Sequence[Planned]) -> None:
        """Add schedules, before any beat runs."""

    @abstractmethod
    def change(self, name: str) -> datetime | None:
        """Add a schedule that is due at once; returns when that was written. None: beat has to be restarted."""

    @abstractmethod
    def lose_store(self, seconds: float) -> None:
        """Take the store away for so long."""

    @abstractmethod
    def firings(self, arrivals: Sequence[Arrival], every: timedelta | None) -> list[Firing]:
        """The instant of each message, for schedules of this ``every``."""

    @abstractmethod
    def starts(self, arrivals: Sequence[Arrival]) -> list[str]:
        """The message ids with which a worker starts the function when all these are given to it, after beat ended."""

    def beat(self, number: int = 1) -> CeleryProcess:
        """Start a beat; several may run, each with its number."""
        return self.project.beat(*self.beat_options(number))

    def beat_options(self, number: int) -> list[str]:
        """What ``celery beat`` takes."""
        return []


class Peer(Scheduler):
    """A scheduler of other people's, in an environment of its own.

    All have Celery try for ever to send a message while the broker is away (``task_publish_retry_policy``), where its
    default gives up after three tries.
    """

    #: The environment, a name in ``benchmarks.peers``.
    environment: ClassVar[str]
    CONFIG = """
        broker_url = {broker!r}
        broker_connection_max_retries = None
        broker_connection_retry_on_startup = True
        task_publish_retry_policy = {{"max_retries": None, "interval_step": 0.2, "interval_max": 1}}
        """

    def configured(self, database_url: str, settings: str) -> Project:
        """A project with these lines in its celeryconfig.py."""
        project = Project(
            self.folder / "project",
            broker=self.broker,
            database_url=database_url,
            celeryconfig="",
            python=python_of(self.environment),
        )
        project.environ["PYTHONPATH"] = str(project.folder)
        lines = [line.strip() for line in self.CONFIG.format(broker=self.broker.url).splitlines()]
        project.write("celeryconfig.py", "\n".join([*lines, *settings.splitlines()]))
        return project

    def write_plan(self, planned: Sequence[Planned]) -> None:
        """Leave ``[name, seconds or None, last run before the first]`` of each schedule in planned.json."""
        rows = [
            [item.name, item.every and item.every.total_seconds(), (item.first - (item.every or MINUTE)).timestamp()]
            for item in planned
        ]
        self.project.write("planned.json", json.dumps(rows))

    def firings(self, arrivals: Sequence[Arrival], every: timedelta | None) -> list[Firing]:
        """By time alone, for a message of Celery's beat does not name its instant.

        Cron: the minute in which it came, so one that is up to a minute late is not lost. Interval: Celery counts it
        from the last run, so the instant is that time after the message before.
        """
        if every is None:
            return [
                Firing(id=item.id, name=item.name, instant=item.at.replace(second=0, microsecond=0), at=item.at)
                for item in arrivals
            ]
        last: dict[str, datetime] = {}
        found = []
        for item in arrivals:
            if item.name in last:
                found.append(Firing(id=item.id, name=item.name, instant=last[item.name] + every, at=item.at))
            last[item.name] = item.at
        return found

    def starts(self, arrivals: Sequence[Arrival]) -> list[str]:
        """Each of them: Celery's worker runs what it gets."""
        return [item.id for item in arrivals]


def killed(server: Valkey | PostgreSQL, seconds: float) -> None:
    """The server is killed with SIGKILL and comes back after so many seconds."""
    server.kill()
    time.sleep(seconds)
    server.start()


def locked(url: str, seconds: float) -> None:
    """Somebody holds the write lock of a SQLite file for so long: what comes nearest to a server that is away."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=60, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
