"""What all task systems have in common here: a folder with their tasks, a worker, a publisher, and a server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import redis

from benchmarks.peers import python_of
from tests.children import ChildProcess
from tests.servers import PostgreSQL, Valkey

#: Tasks that a worker runs at once where it has an event loop.
ASYNC_SLOTS = 1_000
#: And where each takes a thread.
THREADS = 200
PUBLISH_TIMEOUT = 120
PINNED = Path(__file__).with_name("pinned.py")
#: What stands beside the tasks of each system.
COPIED = ("marks.py", "publisher.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """What stores the tasks; private to the benchmark and on the loopback interface."""

    valkey: Valkey
    #: None where no system needs it.
    postgresql: PostgreSQL | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a system runs for one measurement: an empty folder and empty servers."""

    folder: Path
    servers: Servers
    #: Cores that its processes stay on; empty: all.
    cores: Sequence[int] = ()

    @property
    def marks(self) -> Path:
        """What its task functions noted."""
        return self.folder / "marks.bin"


class System(ABC):
    """One task system: tasks ``noop`` and ``sleep``, and how its worker is started.

    Attributes:
        slots: Tasks that a worker runs at once.
    """

    #: The environment, a name in ``benchmarks.peers``; None is this one.
    environment: str | None = None
    #: The module ``app`` of the folder.
    APP: str
    #: Whether a result is stored for each task.
    results: bool = True
    slots: int = ASYNC_SLOTS
    #: Seconds in which it looks for work at least once when it has none; 0.03 where it is told of work.
    looks: float = 0.03
    #: What is to be said beside its numbers.
    words: str = ""

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """Lay out the folder and be there; all its processes end with it.

        Raises:
            PeerUnavailableError: It cannot be measured here; the message says why.
        """
        self.place = place
        self.python = self.find_python()
        place.folder.mkdir(parents=True)
        self._numbers = count(1)
        self._workers: list[ChildProcess] = []
        self._redis = {
            number: redis.Redis(port=place.servers.valkey.port, db=number, socket_timeout=10) for number in (0, 1)
        }
        self._redis[0].flushall()
        try:
            self.lay_out()
            yield
        finally:
            for worker in self._workers:
                worker.close()
            for client in self._redis.values():
                client.close()

    def find_python(self) -> str:
        """The Python that runs it."""
        return sys.executable if self.environment is None else python_of(self.environment)

    def lay_out(self) -> None:
        """Write its files, and what else it needs, such as tables."""
        for name in COPIED:
            shutil.copy(Path(__file__).with_name(name), self.place.folder)
        (self.place.folder / "app.py").write_text(self.APP, "utf-8")

    @abstractmethod
    def command(self) -> list[str]:
        """The arguments of Python that start a worker."""

    @abstractmethod
    def unfinished(self, count: int) -> int:
        """How many of so many tasks it does not yet know as ended, with their results stored where it has results."""

    def environ(self) -> dict[str, str]:
        """The whole environment of its processes."""
        return {
            **os.environ,
            "HOME": str(self.place.folder),
            "PYTHONPATH": str(self.place.folder),
            "PYTHONUNBUFFERED": "1",
            "MARKS": str(self.place.marks),
            "REDIS_PORT": str(self.place.servers.valkey.port),
            "SLOTS": str(self.slots),
            "PAUSE": str(self.looks),
        }

    def worker(self, cores: Sequence[int] | None = None) -> ChildProcess:
        """Start a worker; without waiting until it is ready."""
        name = f"worker-{next(self._numbers)}"
        argv = self._on(self.place.cores if cores is None else cores, [self.python, *self.command()])
        started = ChildProcess(
            argv, name=name, log=self.place.folder / f"{name}.log", cwd=self.place.folder, environ=self.environ()
        )
        self._workers.append(started)
        return started

    def publish(self, way: str, task: str, count: int, *arguments: float) -> dict[str, Any]:
        """Send tasks from a process of its own; what that says.

        Raises:
            RuntimeError: It failed; with the last line of what it wrote.
        """
        argv = [self.python, "publisher.py", way, task, str(count), *map(str, arguments)]
        done = subprocess.run(
            self._on(self.place.cores, argv),
            cwd=self.place.folder,
            env=self.environ(),
            capture_output=True,
            text=True,
            timeout=PUBLISH_TIMEOUT,
        )
        if done.returncode:
            raise RuntimeError(f"publishing failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
        return said

    def run(self, *arguments: str) -> None:
        """Run a module of its environment to its end."""
        subprocess.run(
            [self.python, *arguments],
            cwd=self.place.folder,
            env=self.environ(),
            check=True,
            capture_output=True,
            text=True,
            timeout=PUBLISH_TIMEOUT,
        )

    def redis(self, number: int = 0) -> redis.Redis:
        """A client of one of the databases: 0 has the tasks, and 1 the results of those that keep them elsewhere."""
        return self._redis[number]

    def _on(self, cores: Sequence[int], argv: list[str]) -> list[str]:
        return [self.python, str(PINNED), ",".join(map(str, cores)), *argv] if cores else argv
