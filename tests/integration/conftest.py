"""Real processes for integration tests: a project folder with its own broker, a worker, a beat."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import or_without
from tests.ledger import Ledger
from tests.processes import CeleryProcess, Project
from tests.servers import Valkey, valkey


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Valkey]:
    """A Valkey server of the test's own, on a unix socket: the test may kill it."""
    with or_without(valkey(tmp_path / "broker", unix=True)) as server:
        yield server


@pytest.fixture
def project_database_url(tmp_path: Path) -> str:
    """Where the project keeps its ledger: SQLite. Override it by ``database_url`` to run on every database."""
    return f"sqlite:///{tmp_path / 'project' / '.llmtasks' / 'llmtasks.db'}"


@pytest.fixture
def project(tmp_path: Path, broker: Valkey, project_database_url: str) -> Iterator[Project]:
    """A new project folder with the repository's celeryconfig.py, a broker and a database of its own."""
    project = Project(tmp_path / "project", broker=broker, database_url=project_database_url)
    yield project
    project.close()


@pytest.fixture
def worker(project: Project) -> CeleryProcess:
    """A worker of the project. Ask for it after the task modules are written: see ``Project.worker``."""
    return project.worker()


@pytest.fixture
def beat(project: Project) -> CeleryProcess:
    """A beat of the project."""
    return project.beat()


@pytest.fixture
def ledger(project: Project) -> Ledger:
    """The project's runs."""
    return Ledger(project)


@pytest.fixture
def tasks(project: Project) -> Any:
    """The project's tasks, by their names, to be sent from this process."""
    return project.app.tasks
