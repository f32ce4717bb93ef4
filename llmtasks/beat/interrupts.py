"""Signals wait while beat is inside a tick."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

ENDING: Final = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def undisturbed() -> Generator[None]:
    """Hold the signals that end beat back until the block is left; a second one passes at once.

    Their handler raises SystemExit. Inside a statement that makes SQLAlchemy drop the connection while its cursor is
    open, and SQLite's file stays locked, for everybody, as long as the traceback lives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # nowhere else can handlers be set, and nowhere else do they run
        return
    held: list[int] = []
    usual: dict[int, Any] = {number: signal.getsignal(number) for number in ENDING}

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            usual[number](number, frame)
        held.append(number)

    mine = [number for number in ENDING if callable(usual[number])]
    for number in mine:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, usual[number])
    if held:
        usual[held[0]](held[0], None)
