"""pytest-celery's nodes as local processes: Valkey from its wheel, and ``celery worker`` from this environment.

pytest-celery drives containers through Docker's client. Here the client's container is replaced by ``LocalContainer``,
which has the part of its interface that the nodes use, so that ``celery_setup`` and all else work without Docker.
``tests/conftest.py`` registers this module as a plugin, unless ``--docker`` asks for pytest-celery's own containers.
"""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery._state
import pytest
from celery import Celery
from pytest_celery import (
    CELERY_REDIS_BACKEND,
    CELERY_REDIS_BROKER,
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryWorkerContainer,
    RedisContainer,
)

from tests.children import ChildProcess
from tests.conftest import or_without
from tests.processes import disconnect
from tests.servers import valkey

VALKEY_PORT = "6379/tcp"


class LocalContainer:
    """A child process with the interface of ``docker.models.containers.Container``.

    Attributes:
        id: As long as Docker's; its first twelve characters are the host name of a worker node.
        attrs: The part of Docker's description of a container that nodes read.
    """

    def __init__(self, process: ChildProcess, *, id: str = "", ports: dict[str, int] | None = None) -> None:
        """Stand for ``process``; ``ports`` maps the container's port (``6379/tcp``) to that of this machine."""
        self.process = process
        self.id = id or uuid.uuid4().hex
        self.name = f"{process.name}-{self.id[:6]}"
        self.labels: dict[str, str] = {}
        published = {port: [{"HostPort": str(number)}] for port, number in (ports or {}).items()}
        self.attrs = {"Config": {"Hostname": "127.0.0.1"}, "NetworkSettings": {"Networks": {}, "Ports": published}}

    @property
    def status(self) -> str:
        return "running" if self.process.running else "exited"

    def reload(self) -> None:
        """Nothing: ``status`` is never old."""

    def logs(self, **options: Any) -> bytes:
        """The log since the latest start, so that a restarted node is not ready before it is."""
        return self.process.log_of_this_start().encode()

    def kill(self, signal_name: str | int | None = None) -> None:
        """SIGKILL ends every process of a container; any other signal goes to its first process."""
        name = signal_name or "SIGKILL"
        number = signal.Signals[name] if isinstance(name, str) else signal.Signals(name)
        if number is signal.SIGKILL:
            self.process.kill()
        else:
            self.process.signal(number)

    def stop(self, timeout: float = 10) -> None:
        """SIGTERM, and SIGKILL after ``timeout`` seconds, as Docker does."""
        try:
            self.process.terminate(timeout)
        except AssertionError:
            self.process.close()

    def restart(self, timeout: float = 10) -> None:
        self.stop(timeout)
        self.process.start()

    def exec_run(self, command: str, **options: Any) -> tuple[int, bytes]:
        """Run a shell command where the process runs."""
        environ = {**self.process.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, shell=True, cwd=self.process.cwd, env=environ, capture_output=True)
        return done.returncode, done.stdout + done.stderr


class LocalRedisContainer(RedisContainer):  # type: ignore[misc]
    """A Valkey node: reached by the same loopback port from everywhere, for there is no Docker network."""

    @property
    def url(self) -> str:
        return self.host_url

    @property
    def host_url(self) -> str:
        return f"{self.prefix()}127.0.0.1:{self.port}/{self.vhost}"

    def get_addr(self, port: str) -> tuple[str, int]:
        return "127.0.0.1", self.ports[port][0]

    def get_open_tcp_ports(self) -> list[str]:
        # Asked about published ports only, and ``Valkey`` has waited until it listens.
        return [VALKEY_PORT.split("/")[0]]


@pytest.fixture(params=[CELERY_REDIS_BROKER])
def celery_broker(request: pytest.FixtureRequest) -> Iterator[CeleryTestBroker]:
    """The brokers of the test matrix: those that run here without Docker."""
    node: CeleryTestBroker = request.getfixturevalue(request.param)
    yield node
    node.teardown()


@pytest.fixture(params=[CELERY_REDIS_BACKEND])
def celery_backend(request: pytest.FixtureRequest) -> Iterator[CeleryTestBackend]:
    """The result backends of the test matrix."""
    node: CeleryTestBackend = request.getfixturevalue(request.param)
    yield node
    node.teardown()


@pytest.fixture
def default_redis_broker(tmp_path: Path) -> Iterator[RedisContainer]:
    yield from _valkey_node(tmp_path / "broker")


@pytest.fixture
def celery_redis_backend(default_redis_backend: RedisContainer) -> Iterator[CeleryTestBackend]:
    """The backend's node; pytest-celery's own looks at every object alive and so binds every stand-in for a task."""
    node = CeleryTestBackend(default_redis_backend)
    yield node
    node.teardown()


@pytest.fixture
def default_redis_backend(tmp_path: Path) -> Iterator[RedisContainer]:
    yield from _valkey_node(tmp_path / "backend")


def _valkey_node(folder: Path) -> Iterator[RedisContainer]:
    with or_without(valkey(folder)) as server:
        yield LocalRedisContainer(LocalContainer(server.process, ports={VALKEY_PORT: server.port}))


@pytest.fixture
def default_worker_env(default_worker_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The worker's settings; its ledger is a SQLite file of the test's own."""
    home = str(tmp_path / "home")
    return {**default_worker_env, "LLMTASKS_HOME": home, "PYTHONPATH": str(tmp_path / "worker")}


@pytest.fixture
def default_worker_container(
    tmp_path: Path,
    default_worker_command: list[str],
    default_worker_initial_content: dict[str, bytes],
    default_worker_env: dict[str, str],
) -> Iterator[CeleryWorkerContainer]:
    """A ``celery worker`` in a folder with the app and the task modules that pytest-celery makes."""
    folder = tmp_path / "worker"
    for name, content in default_worker_initial_content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    identity = uuid.uuid4().hex
    arguments = [part.replace("%h", identity[:12]) for part in default_worker_command]
    process = ChildProcess(
        [sys.executable, "-m", *arguments],
        name="worker",
        log=tmp_path / "worker.log",
        cwd=folder,
        environ={**os.environ, **default_worker_env},
    )
    try:
        container = CeleryWorkerContainer(LocalContainer(process, id=identity))
        process.wait_for_log(container.ready_prompt)
        yield container
    finally:
        process.close()


@pytest.fixture
def celery_setup_app(celery_setup_app: Celery) -> Iterator[Celery]:
    """The app of pytest-celery, disconnected after the test and current no longer."""
    yield celery_setup_app
    disconnect(celery_setup_app)
    celery._state._set_current_app(None)  # type: ignore[attr-defined]
