"""The embedded broker's data directory: private to its user, and held by one process at a time."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Final

from llmtasks.errors import ConfigurationError

#: Seconds that a stopping server has to write its file to the disk.
STOP_TIMEOUT: Final = 30.0


def make_private(directory: Path, *, strict: bool = False) -> None:
    """Make ``directory`` with mode 0700 if it is not there.

    Args:
        directory: The directory; what is above it is made too.
        strict: Refuse one that others own or may enter, as in a shared temporary directory.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise ConfigurationError(
            f"the data directory {directory} cannot be made: {error.strerror}; set LLMTASKS_HOME to one that can"
        ) from error
    if strict and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077):
        raise ConfigurationError(
            f"{directory} must be a directory of user {os.getuid()} with mode 0700, for nobody else: remove it, or set "
            "LLMTASKS_HOME to a shorter path"
        )


def take(home: Path) -> int:
    """Lock ``home`` for this process and write its pid in the lock file; the file descriptor is the lock.

    A child that inherits the descriptor holds the lock too.

    Raises:
        ConfigurationError: Another process holds it.
    """
    descriptor = os.open(home / "broker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + STOP_TIMEOUT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            # A server whose starter was killed holds the lock for the moment that it needs to end.
            if not _alive(holder) and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            os.close(descriptor)
            raise ConfigurationError(
                f"process {holder or '?'} already runs the broker of {home}: stop it first, or set another "
                "LLMTASKS_HOME"
            ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
