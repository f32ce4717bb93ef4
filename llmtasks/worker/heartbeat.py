"""The process's own row: that it lives, how much CPU and memory it and its children use."""

from __future__ import annotations

import logging
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from llmtasks.dispatch import Station
from llmtasks.errors import LLMTasksError
from llmtasks.owner import BOOT_ID
from llmtasks.store import processes
from llmtasks.store.processes import Process

if TYPE_CHECKING:
    import psutil

logger = logging.getLogger(__name__)


class ProcessHeart:
    """Stamps the row of this worker every ``heartbeat`` seconds, in a thread of its own."""

    def __init__(self, at: Station, *, name: str, pool: str, concurrency: int) -> None:
        import psutil  # only where a worker runs

        self._at = at
        self._name, self._pool, self._concurrency = name, pool, concurrency
        self._started = time.monotonic()
        self._process = psutil.Process()
        self._cpu_of: dict[int, psutil.Process] = {}
        self._functions: tuple[str, ...] = ()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="llmtasks-process-heart", daemon=True)

    def start(self) -> None:
        """Begin to stamp."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and take the row away: the process ends in order."""
        self._stop.set()
        self._thread.join(5)
        try:
            with self._at.database.transaction() as tx:
                processes.leave(tx, BOOT_ID)
        except LLMTasksError as error:
            logger.warning("the worker's row stays until it is forgotten: %s", error)

    def _loop(self) -> None:
        while True:
            try:
                described = self._described()
                with self._at.database.transaction() as tx:
                    processes.stamp(tx, described, anew=described.functions != self._functions)
                self._functions = described.functions
            except LLMTasksError:
                pass  # the keeper beside us says that the database is away
            except Exception:
                logger.exception("the worker could not describe itself")
            if self._stop.wait(self._at.settings.heartbeat):
                return

    def _described(self) -> Process:
        cpu, memory = self._usage()
        now = self._at.database.now()
        return Process(
            id=BOOT_ID,
            app=self._at.name,
            kind="worker",
            name=self._name,
            pid=os.getpid(),
            pool=self._pool,
            concurrency=self._concurrency,
            started_at=now - timedelta(seconds=time.monotonic() - self._started),
            heartbeat_at=now,
            cpu_percent=cpu,
            memory=memory,
            functions=tuple(sorted(self._at.app.tasks)),
            clock_offset=(datetime.now(UTC) - now).total_seconds(),
        )

    def _usage(self) -> tuple[float, int]:
        """CPU percent since the last call and resident bytes, children included."""
        import psutil

        cpu, memory, seen = 0.0, 0, {}
        for process in (self._process, *self._process.children(recursive=True)):
            known = self._cpu_of.get(process.pid, process)
            try:
                cpu += known.cpu_percent(None)
                memory += known.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            seen[process.pid] = known
        self._cpu_of = seen
        return cpu, memory
