"""One process of ``llmtasks dev``: started, watched, started again when it dies, stopped with all that it started."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from llmtasks.broker import leashed
from llmtasks.cli.procfile import Kind

#: A process that ran this many seconds starts again without delay growing.
SETTLED: Final = 30.0
LONGEST_DELAY: Final = 30.0
#: A worker or beat that logged nothing for this many seconds (its log level may hide it) counts as up.
QUIET: Final = 30.0
_LINE_BYTES: Final = 1_000_000


class Reporter(Protocol):
    """Whoever tells the user."""

    def up(self, name: str, pid: int, url: str | None) -> None:
        """The process does its work."""
        ...

    def died(self, name: str, exit_code: int, delay: float) -> None:
        """The process ended by itself (negative: by that signal) and starts again after ``delay`` seconds."""
        ...

    def stopped(self, name: str) -> None:
        """The process ended because it was told to."""
        ...

    def output(self, name: str, line: str) -> None:
        """The process wrote a line."""
        ...


class Backoff:
    """Seconds to wait before the next start: 1, 2, 4, ... 30; from 1 again after a start that lasted."""

    def __init__(self) -> None:
        self._next = 1.0

    def after(self, ran: float) -> float:
        """The delay after a process that ran for ``ran`` seconds."""
        delay = 1.0 if ran >= SETTLED else self._next
        self._next = min(2 * delay, LONGEST_DELAY)
        return delay


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to start a process now, and how to see that it is up.

    Attributes:
        command: Program and arguments.
        environ: Its whole environment.
        kind: What to look for.
        address: Host and port on which a Flower answers.
    """

    command: Sequence[str]
    environ: Mapping[str, str]
    kind: Kind
    address: tuple[str, int] | None = None

    @property
    def url(self) -> str | None:
        """Where to look at it, if one can."""
        return f"http://{self.address[0]}:{self.address[1]}" if self.address else None


class Child:
    """One supervised process.

    Args:
        name: Its name in the Procfile.
        prepare: Called before each start.
        reporter: Told of all that happens.
    """

    def __init__(self, name: str, prepare: Callable[[], Launch], reporter: Reporter) -> None:
        self.name = name
        self.up = asyncio.Event()
        self._prepare = prepare
        self._reporter = reporter
        self._stop = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._ready_logged = asyncio.Event()

    async def run(self) -> None:
        """Keep the process running until `stop`."""
        backoff = Backoff()
        while not self._stop.is_set():
            began = time.monotonic()
            exit_code = await self._run_once(self._prepare())
            if self._stop.is_set():
                break
            delay = backoff.after(time.monotonic() - began)
            self._reporter.died(self.name, exit_code, delay)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay)
        self._reporter.stopped(self.name)

    def stop(self) -> None:
        """Ask the process to end, and start it no more; `run` returns when it did."""
        self._stop.set()
        if self._process is not None:
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process and whatever it started, at once."""
        self._stop.set()
        if self._process is not None:
            self._kill_group(self._process.pid)

    async def _run_once(self, launch: Launch) -> int:
        loop = asyncio.get_running_loop()
        # A pipe of our own: asyncio's would keep `wait` from returning while a grandchild holds it.
        ours, theirs = os.pipe()
        self._ready_logged.clear()
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                # What runs has a lease, so its sudden end loses nothing; without us it must not linger.
                *leashed(launch.command, signal.SIGKILL),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                env=launch.environ,
                start_new_session=True,  # Ctrl-C reaches us alone: we stop the processes in their order
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        if self._stop.is_set():
            self._signal(signal.SIGTERM)
        stream = asyncio.StreamReader()
        pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(ours, "rb", 0))
        reading = asyncio.create_task(self._forward(stream))
        looking = asyncio.create_task(self._announce(launch, process.pid))
        try:
            return await process.wait()
        finally:
            self._process = None
            looking.cancel()
            self._kill_group(process.pid)
            await asyncio.wait({reading}, timeout=1)
            reading.cancel()
            pipe.close()

    async def _forward(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await stream.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._line(line)
        if rest:
            self._line(rest)

    def _line(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        # celery/apps/worker.py: "%s ready."; celery/beat.py: "beat: Starting..."
        if line.endswith(" ready.") or "beat: Starting" in line:
            self._ready_logged.set()
        self._reporter.output(self.name, line)

    async def _announce(self, launch: Launch, pid: int) -> None:
        if launch.address is not None:
            while not await _answers(*launch.address):  # noqa: ASYNC110 - another process has no Event to wait for
                await asyncio.sleep(0.1)
        elif launch.kind is Kind.OTHER:
            await asyncio.sleep(1)
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ready_logged.wait(), QUIET)
        self._reporter.up(self.name, pid, launch.url)
        self.up.set()

    def _signal(self, signum: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signum)

    def _kill_group(self, pid: int) -> None:
        # The process leads its own session, so its group is all that it started and did not detach.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def free_port(host: str, port: int) -> int:
    """The first port from ``port`` upwards on which a server can listen."""
    for candidate in range(port, 65536):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError:
                continue
            return candidate
    return port


async def _answers(host: str, port: int) -> bool:
    """Whether an HTTP server answers there, whatever it says."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    try:
        writer.write(f"GET /healthcheck HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        return (await asyncio.wait_for(reader.read(5), 5)) == b"HTTP/"
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()
