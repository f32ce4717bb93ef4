"""Where benchmarks run: a temporary folder with a project, a private Valkey, SQLite or a private PostgreSQL.

The servers and processes are those of the integration tests; nothing outlives its ``with`` block.
"""

from __future__ import annotations

import compileall
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil

import llmtasks
from llmtasks.store.database import Database
from tests.children import ChildProcess
from tests.processes import Project
from tests.servers import PostgreSQL, Valkey, postgresql, valkey

DATABASES = ("sqlite", "postgresql")
APP = "benchmarks"

#: The same empty body three ways: recorded, plain, and plain with the Celery options that registering gives.
TASKS = """
from celery import shared_task
from llmtasks import task_registry


@task_registry.register(name="recorded")
def recorded(value=None):
    return None


@task_registry.register(name="recorded_async")
async def recorded_async(value=None):
    return None


@shared_task(name="plain")
def plain(value=None):
    return None


@shared_task(name="plain_alike", acks_late=True, soft_time_limit=3600, time_limit=3610)
def plain_alike(value=None):
    return None
"""


@contextmanager
def project(database: str = "sqlite") -> Iterator[Project]:
    """A project whose database is migrated and whose broker is a Valkey server on a unix socket."""
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="llmtasks-benchmark-", ignore_cleanup_errors=True))
        )
        broker = stack.enter_context(valkey(folder / "valkey", unix=True))
        url, _ = stack.enter_context(database_in(folder, database))
        made = project_on(folder, broker, url)
        stack.callback(made.close)
        yield made


@contextmanager
def database_in(folder: Path, database: str) -> Iterator[tuple[str, PostgreSQL | None]]:
    """The URL of an empty database, and the private server that holds it, if one does."""
    if database == "sqlite":
        yield f"sqlite:///{folder / 'database.db'}", None
        return
    with postgresql(folder) as server:
        yield server.create_database(), server


def project_on(folder: Path, broker: Valkey, url: str) -> Project:
    """A project with the functions above; its database is migrated. The caller closes it."""
    # pip does this where it installs; a checkout would be compiled at each start where Python may not write it down.
    compileall.compile_dir(Path(llmtasks.__file__).parent, quiet=1)
    opened = Database(url)
    opened.migrate()
    opened.close()
    made = Project(folder / "project", broker=broker, database_url=url)
    made.environ["LLMTASKS_APP"] = APP
    made.tasks(TASKS)
    return made


@contextmanager
def database_of(made: Project) -> Iterator[Database]:
    """The project's database, opened by this process."""
    opened = Database(made.database_url)
    try:
        yield opened
    finally:
        opened.close()


def cpu_seconds(process: ChildProcess) -> float:
    """CPU time that a process and its living descendants have used."""
    return sum(cpu_seconds_of(pid) for pid in (process.pid, *(member.pid for member in process.family())))


def cpu_seconds_of(pid: int) -> float:
    """CPU time that a process has used: in nanoseconds on Linux, where psutil counts hundredths of a second."""
    if sys.platform == "linux":
        return time.clock_gettime(~pid << 3 | 2)  # CPUCLOCK_SCHED, as clock_getcpuclockid(3) makes it
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def started_at(process: ChildProcess) -> datetime:
    """When the process began, as the kernel knows it (to a hundredth of a second)."""
    return datetime.fromtimestamp(psutil.Process(process.pid).create_time(), UTC)


def logged_at(process: ChildProcess, text: str) -> datetime:
    """When the process logged ``text`` first; Celery's log lines begin with the local time in milliseconds."""
    line = next(line for line in process.log_of_this_start().splitlines() if text in line)
    return datetime.strptime(line[1:24], "%Y-%m-%d %H:%M:%S,%f").astimezone(UTC)
