"""A project whose processes are killed: its broker lives as long as the module, its workers as long as a test."""

from collections.abc import Callable, Iterator

import pytest

from tests.ledger import QUICK, Ledger, project_with
from tests.processes import CeleryProcess, Project


@pytest.fixture(scope="module")
def environ() -> dict[str, str]:
    """What the module's processes find in their environment; a module that measures the defaults overrides it."""
    return QUICK


@pytest.fixture(scope="module")
def project(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, environ: dict[str, str]
) -> Iterator[Project]:
    """A project with the module's ``TASKS``."""
    name = str(request.module.__name__).rpartition(".")[2]
    with project_with(tmp_path_factory.mktemp(name), request.module.TASKS, **environ) as project:
        yield project


@pytest.fixture
def ledger(project: Project) -> Ledger:
    """The project's runs."""
    return Ledger(project)


@pytest.fixture
def start_worker(project: Project) -> Iterator[Callable[..., CeleryProcess]]:
    """Start a worker of the project; it ends with the test."""
    started: list[CeleryProcess] = []

    def start(concurrency: int = 2, pool: str | None = None) -> CeleryProcess:
        worker = project.worker(concurrency=concurrency, pool=pool)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.close()
