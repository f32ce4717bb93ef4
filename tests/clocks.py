"""Processes with a clock of their own, through libfaketime; a file says how far it is off the system's."""

from pathlib import Path

from tests.processes import Project


def library() -> Path | None:
    """libfaketime, where Debian's package puts it; None where it is not installed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return found[0] if found else None


#: libfaketime 0.9.10 takes the end of every sleep for a time of the wall clock; it leaves ``select`` alone.
_SLEEP = """
import select
import time


def sleep(seconds):
    select.select([], [], [], seconds)


time.sleep = sleep
"""


class Clock:
    """The wall clock of what is started with it. Monotonic clocks are left alone: a step is one of the wall clock."""

    def __init__(self, file: Path, library: Path) -> None:
        self._file = file
        self._library = library
        self.put(0)

    def put(self, seconds: float) -> None:
        """Let it be this far ahead of the system's clock, or behind."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+g}\n")
        new.rename(self._file)

    def give_to(self, project: Project) -> None:
        """What the project starts from now on has this clock."""
        project.write("sitecustomize.py", _SLEEP)
        project.environ |= {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",  # all at once: processes of one host have one clock
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
