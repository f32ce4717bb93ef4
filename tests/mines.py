"""Mines: kill a test's worker or beat with SIGKILL where its code is at a named place, without a word in that code.

A module that a project imports; the test lays a mine, the first process that comes to the place takes it up and dies.
The place is seen by Python's own hook for profilers.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from celery import signals

#: Where a mine lies, and who stepped on it, below the project's folder.
LAID = Path("mine.laid")
EXPLODED = Path("mine.exploded")


def lay(folder: Path, *, event: str, file: str, function: str, kills: str) -> None:
    """Lay a mine.

    Args:
        folder: The project's.
        event: ``call`` or ``return``: where the function begins, or where it has ended.
        file: The end of the path of the module's file.
        function: The function's name.
        kills: ``process`` alone, or the whole ``worker``.
    """
    (folder / EXPLODED).unlink(missing_ok=True)
    laid = folder / f"{LAID}.new"
    laid.write_text(f"{event}\n{file}\n{function}\n{kills}\n")
    laid.rename(folder / LAID)


def exploded(folder: Path) -> bool:
    """Whether somebody stepped on the mine."""
    return (folder / EXPLODED).exists()


def _watch(frame: FrameType, event: str, _argument: Any) -> None:
    if event not in {"call", "return"} or not LAID.exists():
        return
    try:
        at_event, file, function, kills = LAID.read_text().splitlines()
    except FileNotFoundError:  # somebody was quicker
        return
    code = frame.f_code
    if event != at_event or code.co_name != function or not code.co_filename.endswith(file):
        return
    try:
        LAID.rename(EXPLODED)  # one process only
    except FileNotFoundError:
        return
    if kills == "worker" and _main_pid != os.getpid():
        os.kill(_main_pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


_main_pid = os.getpid()


@signals.beat_init.connect
@signals.worker_init.connect  # before the asyncio pool starts its thread
@signals.worker_ready.connect
@signals.worker_process_init.connect
def _begin(**_: object) -> None:
    sys.setprofile(_watch)
    threading.setprofile(_watch)
