"""How task functions of tests and the tests speak with each other: notes and gates, files in the project's folder."""

import asyncio
import os
import time
from pathlib import Path


def note(name: str, text: object = "") -> None:
    """Add a line to the notes called ``name``: what the function wants the test to know."""
    handle = os.open(f"{name}.notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, f"{text}\n".encode())  # one call: lines of several processes do not mix
    finally:
        os.close(handle)


def notes(name: str, folder: Path | None = None) -> list[str]:
    """The lines of the notes called ``name``."""
    path = (folder or Path()) / f"{name}.notes"
    return path.read_text("utf-8").splitlines() if path.exists() else []


def open_gate(name: str, folder: Path | None = None) -> None:
    """Let the functions go on that wait at this gate, now and later."""
    ((folder or Path()) / f"{name}.gate").touch()


def is_open(name: str, folder: Path | None = None) -> bool:
    """Whether somebody opened this gate."""
    return ((folder or Path()) / f"{name}.gate").exists()


async def gate(name: str) -> None:
    """Wait until the test opens this gate."""
    while not is_open(name):
        await asyncio.sleep(0.02)


def gate_sync(name: str) -> None:
    """Wait until the test opens this gate, blocking the thread."""
    while not is_open(name):
        time.sleep(0.02)
