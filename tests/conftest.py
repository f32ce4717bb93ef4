"""What all tests stand on: a clean environment, real servers on demand, logs of processes in failure reports."""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import celery._state
import pytest

from tests import children, processes
from tests.servers import (
    DATABASE_SERVERS,
    DatabaseServer,
    MariaDB,
    PostgreSQL,
    RabbitMQ,
    ServerUnavailable,
    Valkey,
    mariadb,
    postgresql,
    rabbitmq,
    valkey,
)

S = TypeVar("S")

IN_CI = bool(os.environ.get("CI")) or os.environ.get("LLMTASKS_CI") == "1"

#: The databases that a test with ``database_url`` runs on. A server's name is its mark and begins the name of its
#: session fixture: one more is a name here, a mark in pyproject.toml and a fixture ``<name>_server``.
DATABASES = ["sqlite", "postgresql", "mariadb"]
SERVERS = [name for name in DATABASES if name != "sqlite"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--docker",
        action="store_true",
        help="run pytest-celery's nodes in its own containers (default: as local processes)",
    )

    pool = processes.DEFAULT_POOL
    parser.addoption("--pool", default=pool, help=f"the pool of workers whose test does not choose one ({pool})")


def pytest_configure(config: pytest.Config) -> None:
    processes.DEFAULT_POOL = config.getoption("--pool")
    # Settings of the developer's shell must not reach the tests. Their own are LLMTASKS_CI and the fixtures'.
    for name in [name for name in os.environ if name.startswith(("LLMTASKS_", "CELERY_", "FLOWER_"))]:
        if name != "LLMTASKS_CI":
            del os.environ[name]
    _stop_in_order_on_sigterm()
    _forget_the_app_of_pytest_celery()
    if config.getoption("--docker"):
        _require_docker()
        # Docker's client and pytest-docker-tools leave sockets to the garbage collector.
        config.addinivalue_line("filterwarnings", "ignore:unclosed:ResourceWarning")
    else:
        from tests import pytest_celery_nodes

        # Registered last, its fixtures replace those of the same name in pytest-celery.
        config.pluginmanager.register(pytest_celery_nodes, "llmtasks-local-nodes")


def _require_docker() -> None:
    import docker  # type: ignore[import-untyped]

    try:
        docker.from_env().ping()
    except docker.errors.DockerException as error:
        raise pytest.UsageError(f"--docker: no Docker engine answers here ({error})") from None


def _forget_the_app_of_pytest_celery() -> None:
    """pytest-celery, loaded into every run, made the app of its worker template current: undo that."""
    from pytest_celery.vendors.worker.content import app as template

    template.app.close()
    celery._state._set_current_app(None)  # type: ignore[attr-defined]


def _stop_in_order_on_sigterm() -> None:
    """SIGTERM ends the run as Ctrl-C does, so that fixtures stop what they started."""
    tests_pid = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != tests_pid:  # a fork of the tests, which has no fixtures to end
            os._exit(128 + number)
        pytest.exit("terminated", returncode=128 + number)

    signal.signal(signal.SIGTERM, stop)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show the ends of the processes' logs with a failure."""
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        for child in children.STARTED:
            state = "running" if child.running else f"ended with {child.process.returncode}"
            title = f"log of {child.name} (pid {child.pid}, {state}): {child.log_path}"
            report.sections.append((title, child.tail()))  # type: ignore[attr-defined]
    return report


def pytest_runtest_logfinish() -> None:
    children.forget_ended()


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One Valkey server for the session; a test that kills or fills it starts its own with ``tests.servers.valkey``."""
    with or_without(valkey(tmp_path_factory.mktemp("valkey"))) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    """One PostgreSQL server for the session; tests share it by databases of their own."""
    with or_without(postgresql(tmp_path_factory.mktemp("postgresql"))) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """One MariaDB server for the session; tests share it by databases of their own."""
    with or_without(mariadb(tmp_path_factory.mktemp("mariadb"))) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """One RabbitMQ node for the session, because it starts slowly. Tests have virtual hosts, and may restart it."""
    with or_without(rabbitmq(tmp_path_factory.mktemp("rabbitmq"))) as server:
        yield server


@contextlib.contextmanager
def or_without(server: AbstractContextManager[S]) -> Iterator[S]:
    """The server while the block runs; a test that cannot have it does without."""
    try:
        with server as running:
            yield running
    except ServerUnavailable as absent:
        do_without(absent)


def do_without(absent: ServerUnavailable | str) -> NoReturn:
    """Skip here, where a developer may lack a service; fail in CI, where a skip would hide it."""
    if IN_CI:
        pytest.fail(f"absent in CI: {absent}")
    pytest.skip(str(absent))


def on(*names: str) -> pytest.MarkDecorator:
    """Run a test with ``database_url`` on these of ``DATABASES`` only."""
    return pytest.mark.parametrize("database_url", parameters(names), indirect=True)


def parameters(names: Iterable[str]) -> list[object]:
    """Databases as a fixture's ``params``, each with its mark."""
    return [pytest.param(name, marks=() if name == "sqlite" else (getattr(pytest.mark, name),)) for name in names]


@pytest.fixture(params=parameters(DATABASES))
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The SQLAlchemy URL of an empty database: the test runs once on each of ``DATABASES``."""
    yield from empty_database(request, tmp_path)


def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The SQLAlchemy URL of an empty database of the kind that the fixture's parameter names."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'llmtasks.db'}"
        return
    server = request.getfixturevalue(f"{request.param}_server")
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.fixture(params=parameters(SERVERS))
def database_server(request: pytest.FixtureRequest) -> DatabaseServer:
    """Each of the session's database servers."""
    server: DatabaseServer = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture(params=parameters(SERVERS))
def own_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DatabaseServer]:
    """A database server for one test, which stops it."""
    folder = tmp_path / "own-server"
    folder.mkdir()
    with or_without(DATABASE_SERVERS[request.param](folder)) as server:
        yield server
