"""How sentences for people say numbers, spans of time, instants and lists."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

#: Names that a list in a sentence has at most.
NAMED: Final = 5


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 0.123 s, 12.3 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s"
    for name, size, small_name, small in (("min", 60, "s", 1), ("h", 3_600, "min", 60), ("d", 86_400, "h", 3_600)):
        rest = int(seconds % size // small)
        if name == "d" or seconds < size * (60 if name == "min" else 24):
            return f"{int(seconds // size)} {name}" + (f" {rest} {small_name}" if rest else "")
    raise AssertionError("unreachable: days take all that is left")


def utc(instant: datetime) -> str:
    """An instant in UTC, to the second."""
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def counted(number: int, noun: str) -> str:
    """A number of things: 1 message, 2 messages."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Iterable[str]) -> str:
    """Names in a sentence, the first few of many."""
    names = list(names)
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
