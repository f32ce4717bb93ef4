"""Processes that tests start: each in a session of its own, with a log, and gone when the tests are gone.

A child dies with the process that started it (on Linux even if that was killed with SIGKILL), and ``STARTED`` knows the
children of the running test, so that a failure shows the ends of their logs.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.waiting import wait_until

#: Children of the running test, and older ones that still run (servers of the whole session).
STARTED: list["ChildProcess"] = []

#: ``prctl`` looked up here, once: between fork and exec there is no safe moment to load a library.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class ChildProcess:
    """One program, started now, that can be killed and started again with the same arguments.

    Start it from a thread that outlives it: on Linux the death of the starting thread counts as the parent's.

    Attributes:
        name: Names it in failure reports.
        log_path: Where its output goes; every start appends.
        cwd: Its working directory.
        environ: Its whole environment.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        name: str,
        log: Path,
        cwd: Path,
        environ: Mapping[str, str] | None = None,
        user: tuple[int, int] | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        """Start ``argv``.

        Args:
            argv: The program and its arguments.
            name: Names it in failure reports.
            log: The file that its output is appended to.
            cwd: Its working directory.
            environ: Its whole environment; None is that of this process.
            user: User and group id to run as; None is the same as this process.
            death_signal: What it gets when this process dies (Linux).
        """
        self.name = name
        self.log_path = log
        self._argv = [str(part) for part in argv]
        self.cwd = cwd
        self.environ = dict(os.environ if environ is None else environ)
        self._user = user
        self._death_signal = death_signal
        self._family: list[psutil.Process] = []
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start the program, which must not be running."""
        assert not self.running, f"{self.name} runs already"
        number = int(self._death_signal)
        user, group = self._user or (None, None)

        def die_with_parent() -> None:
            if _prctl is not None:
                _prctl(_PR_SET_PDEATHSIG, number)

        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log, warnings.catch_warnings():
            # Python 3.12 warns of a fork beside threads. What runs before exec here takes no lock.
            warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
            self._process = subprocess.Popen(
                self._argv,
                cwd=self.cwd,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=user,
                group=group,
                extra_groups=None if user is None else [],
                preexec_fn=die_with_parent,  # runs after user and group are set, which would reset what it does
            )
        if self not in STARTED:
            STARTED.append(self)

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The process of the latest start."""
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        """The main process's id."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the main process lives."""
        return self._process is not None and self._process.poll() is None

    def family(self) -> list[psutil.Process]:
        """The main process's descendants that live now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def log(self) -> str:
        """Everything it wrote, all starts together."""
        return self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""

    def log_of_this_start(self) -> str:
        """What it wrote since it was started last."""
        with contextlib.suppress(FileNotFoundError), self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", "replace")
        return ""

    def wait_for_log(self, text: str, timeout: float = 60) -> None:
        """Wait until ``text`` is in the log of this start.

        Raises:
            AssertionError: It is not there in time, or the process ended without writing it.
        """

        def seen() -> bool:
            ended = not self.running
            found = text in self.log_of_this_start()
            if ended and not found:
                raise AssertionError(
                    f"{self.name} ended with {self.process.returncode} before {text!r}:\n{self.tail()}"
                )
            return found

        wait_until(seen, timeout, f"{text!r} in the log of {self.name}")

    def tail(self, lines: int = 60) -> str:
        """The last lines of the log."""
        return "\n".join(self.log().splitlines()[-lines:])

    def kill(self) -> None:
        """SIGKILL the process and all its descendants at once; return when they are gone."""
        family = self.family()
        for kill in [lambda: os.killpg(self.pid, signal.SIGKILL), *(member.kill for member in family)]:
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                kill()
        self.process.wait(30)
        wait_until(lambda: not any(lives(member) for member in family), 30, f"the children of {self.name} are gone")

    def kill_main(self) -> None:
        """SIGKILL the main process alone; its children find out by themselves."""
        self._family += self.family()
        self.process.kill()
        self.process.wait(30)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the main process."""
        self.process.send_signal(number)

    def terminate(self, timeout: float = 60) -> int:
        """SIGTERM, then wait for the end.

        Returns:
            The exit code.

        Raises:
            AssertionError: It still ran after ``timeout`` seconds (and is killed now).
        """
        if self.running:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(
                    f"{self.name} did not end within {timeout:g} s of SIGTERM:\n{self.tail()}"
                ) from None
        return self.process.returncode

    def close(self) -> None:
        """Leave nothing of it behind, however it is."""
        if self.running:
            self.kill()
        for member in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._family.clear()


def lives(process: psutil.Process) -> bool:
    """Whether it runs: one that only waits for init to collect its exit code is dead."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def forget_ended() -> None:
    """Drop the children that have ended: the next test does not report them."""
    STARTED[:] = [child for child in STARTED if child.running]


@atexit.register
def _close_all() -> None:
    for child in STARTED:
        child.close()
