"""llmtasks with one of its pools, set up by the project's own celeryconfig.py."""

from __future__ import annotations

import compileall
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import llmtasks
from benchmarks.peers import PeerUnavailableError
from benchmarks.systems.celery import CeleryMessages
from benchmarks.systems.system import ASYNC_SLOTS, THREADS
from llmtasks.errors import InvalidOptionError
from llmtasks.registry import TaskRegistry

REPOSITORY = Path(__file__).parents[2]
#: The same coroutine functions in all pools. OPTIONS stands before it.
APP = """
import asyncio
from celery import current_app
from llmtasks import task_registry
from marks import END, START, mark


@task_registry.register(name="noop", **OPTIONS)
async def noop(number):
    mark(START, number)
    mark(END, number)
    return number


@task_registry.register(name="sleep", **OPTIONS)
async def sleep(number, seconds):
    mark(START, number)
    await asyncio.sleep(seconds)
    mark(END, number)
    return number


def connect():
    current_app.loader.import_default_modules()


def send(name, *arguments):
    current_app.tasks[name].delay(*arguments)


def send_many(name, rows):
    current_app.tasks[name].map_delay(rows)
"""


class Ours(CeleryMessages):
    """At its defaults: ledger in SQLite, results in Redis, events on. In bulk: ``map_delay``.

    Without the ledger and results it has ``ledger="off"`` and ``ignore_result=True`` at each registration. Where
    ``register`` knows no ``ledger`` yet, only the results are off, and the row says so.
    """

    SLOTS: ClassVar = {"asyncio": ASYNC_SLOTS, "threads": THREADS, "prefork": 20}

    def __init__(self, pool: str, *, recorded: bool = True) -> None:
        self._pool = pool
        self.slots = self.SLOTS[pool]
        self.results = recorded
        options: dict[str, object] = {} if recorded else {"ledger": "off", "ignore_result": True}
        if not recorded and not knows_ledger():
            del options["ledger"]
            self.words = "only results are off"
        self.APP = f"OPTIONS = {options!r}\n{APP}"

    def find_python(self) -> str:
        if self._pool == "asyncio" and not has_asyncio_pool():
            raise PeerUnavailableError("left out: this llmtasks has no asyncio pool")
        return sys.executable

    def lay_out(self) -> None:
        super().lay_out()
        # pip does this where it installs; a checkout may be compiled at each start.
        compileall.compile_dir(Path(llmtasks.__file__).parent, quiet=1)
        shutil.copy(REPOSITORY / "celeryconfig.py", self.place.folder)

    def environ(self) -> dict[str, str]:
        valkey = self.place.servers.valkey
        return {
            **super().environ(),
            "PYTHONPATH": os.pathsep.join([str(self.place.folder), str(REPOSITORY)]),
            "LLMTASKS_APP": "benchmarks",
            "LLMTASKS_HOME": str(self.place.folder / ".llmtasks"),
            "LLMTASKS_BROKER_URL": valkey.database(0),
            "LLMTASKS_RESULT_URL": valkey.database(1),
            "LLMTASKS_IMPORTS": "app",
            "LLMTASKS_POOL": self._pool,
        }

    def command(self) -> list[str]:
        options = ["-c", str(self.slots), "-l", "WARNING", "--without-gossip", "--without-mingle"]
        return ["-m", "celery", "worker", "-n", f"{next(self._numbers)}@benchmark", *options]


def has_asyncio_pool() -> bool:
    """Whether the worker can run many coroutines on one event loop."""
    try:
        return hasattr(importlib.import_module("llmtasks.worker.pool"), "AsyncioPool")
    except ModuleNotFoundError:
        return False


def knows_ledger() -> bool:
    """Whether a function can be registered without a ledger."""

    def function() -> None:
        return None

    options: dict[str, object] = {"name": "benchmarks_try", "ledger": "off"}
    try:
        TaskRegistry().register(**options)(function)  # type: ignore[call-overload]
    except (InvalidOptionError, TypeError):
        return False
    return True
