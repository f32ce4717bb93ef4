"""What integration tests read of a project: its runs in the ledger, the notes of its task functions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmtasks import Run
from llmtasks.dispatch import station
from llmtasks.states import RunState
from llmtasks.store import runs
from llmtasks.store.database import Database
from tests import notebook
from tests.processes import Project
from tests.servers import Valkey, valkey
from tests.waiting import wait_until

#: A run is given this long; it bounds a failure on a loaded machine, it times nothing.
PATIENCE = 60.0
#: Makes lost workers be noticed soon: for tests that do not measure the promise itself.
QUICK = {"LLMTASKS_HEARTBEAT": "0.5", "LLMTASKS_LEASE": "2"}


class Ledger:
    """The runs of a project, read in the test's own process."""

    def __init__(self, project: Project) -> None:
        self._project = project

    @property
    def database(self) -> Database:
        """The project's database."""
        return station(self._project.app).database

    def run(self, run_id: str) -> Run | None:
        """The run with this id."""
        with self.database.reading() as connection:
            return runs.get(connection, run_id)

    def all(self, func_name: str | None = None) -> list[Run]:
        """All runs, newest first."""
        with self.database.reading() as connection:
            return runs.find(connection, station(self._project.app).name, func_name=func_name, limit=10_000)

    def until(self, run_id: str, condition: Callable[[Run], Any], what: str, timeout: float = PATIENCE) -> Run:
        """Wait until the run meets ``condition``."""

        def met() -> Run | None:
            run = self.run(run_id)
            return run if run is not None and condition(run) else None

        try:
            run = wait_until(met, timeout, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; the run is {self.run(run_id)}") from None
        assert run is not None
        return run

    def becomes(self, run_id: str, *states: RunState, timeout: float = PATIENCE) -> Run:
        """Wait until the run is in one of ``states``."""
        return self.until(run_id, lambda run: run.state in states, f"run is {' or '.join(states)}", timeout)

    def ends(self, run_id: str, timeout: float = PATIENCE) -> Run:
        """Wait until the run has ended and its end was delivered."""
        return self.until(run_id, lambda run: run.state.is_final and run.delivered, "run ended", timeout)

    def notes(self, name: str, count: int = 0, timeout: float = PATIENCE) -> list[str]:
        """The notes called ``name``, once there are at least ``count``."""
        wait_until(lambda: len(self.notes_now(name)) >= count, timeout, f"{count} notes {name!r}")
        return self.notes_now(name)

    def notes_now(self, name: str) -> list[str]:
        """The notes called ``name`` as they are."""
        return notebook.notes(name, self._project.folder)

    def open_gate(self, name: str) -> None:
        """Let functions go on that wait at this gate."""
        notebook.open_gate(name, self._project.folder)


@contextmanager
def project_with(folder: Path, tasks: str, **environ: str) -> Iterator[Project]:
    """A project with a Valkey server, a SQLite ledger and a module ``tasks``; for fixtures of a whole module.

    Args:
        environ: What its processes find in their environment beside the usual.
    """
    with valkey(folder / "broker", unix=True) as broker:
        project = Project(folder / "project", broker=broker, database_url=sqlite_url(folder))
        project.environ.update(environ)
        project.tasks(tasks)
        try:
            yield project
        finally:
            project.close()


def on_pools(tasks: str, *pools: str, **environ: str) -> tuple[Any, Any]:
    """Fixtures of a module whose tests run on several pools: ``pool``, its name, and ``project``, one for each pool.

    Args:
        tasks: The module ``tasks`` of the project.
        pools: What LLMTASKS_POOL is.
        environ: As of ``project_with``.
    """

    @pytest.fixture(scope="module", params=pools)
    def pool(request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture(scope="module")
    def project(tmp_path_factory: pytest.TempPathFactory, pool: str) -> Iterator[Project]:
        with project_with(tmp_path_factory.mktemp(pool), tasks, **environ, LLMTASKS_POOL=pool) as project:
            yield project

    return pool, project


def sqlite_url(folder: Path) -> str:
    """The ledger of the project below ``folder``."""
    return f"sqlite:///{folder / 'project' / '.llmtasks' / 'llmtasks.db'}"


def queue_length(broker: Valkey, queue: str = "celery") -> int:
    """How many messages wait in a queue of the broker, whatever their priority."""
    import redis

    with redis.Redis(unix_socket_path=broker.socket) as client:
        return sum(int(client.llen(key)) for key in client.keys(f"{queue}*") if client.type(key) == b"list")
