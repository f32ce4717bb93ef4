"""How the command line shows things: aligned tables and blocks for people, one JSON document for machines."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click
import tzlocal

from llmtasks.wording import duration as duration

#: A column of texts is never cut below this width.
NARROWEST: Final = 8
_GAP: Final = "  "
_COLOURS: Final = {
    "active": "green", "succeeded": "green", "running": "cyan", "failed": "red", "retrying": "yellow",
    "waiting": "yellow", "paused": "yellow", "cancelled": "bright_black", "completed": "bright_black",
    "skipped": "bright_black", "error": "red", "warning": "yellow", "note": "cyan",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        title: Its heading.
        right: Numbers stand at the right.
        may_shrink: Its texts may be cut where the terminal is too narrow.
    """

    title: str
    right: bool = False
    may_shrink: bool = False


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print rows under their headings, as wide as the terminal where there is one, and which zone the times are in."""
    if not rows:
        click.echo(empty)
        return
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [
        max(width_of(column.title), *(width_of(row[index]) for row in rows)) for index, column in enumerate(columns)
    ]
    if sys.stdout.isatty():
        widths = _fitted(columns, widths, shutil.get_terminal_size().columns)
    click.echo(_styled(_line(columns, widths, [column.title for column in columns]), bold=True))
    for row in rows:
        click.echo(_line(columns, widths, row))
    click.echo(f"\nTimes: {zone_name()}", err=True)


def print_block(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one a line; what has several lines stands below its name."""
    width = max(width_of(name) for name, _ in pairs)
    for name, value in pairs:
        title = _styled(name.ljust(width), bold=True)
        if "\n" in value:
            click.echo(title)
            for line in value.rstrip("\n").split("\n"):
                click.echo(f"    {line}")
        else:
            click.echo(f"{title}  {_state(value)}")


def print_json(value: Any) -> None:
    """Print one JSON document; instants are ISO 8601 in UTC."""
    click.echo(json.dumps(as_json(value), ensure_ascii=False, indent=2, default=str))


def as_json(value: Any) -> Any:
    """``value`` as what JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


def local(instant: datetime | None) -> str:
    """An instant in this machine's zone, to the second."""
    return f"{instant.astimezone():%Y-%m-%d %H:%M:%S}" if instant else "-"


def local_exact(instant: datetime | None) -> str:
    """An instant in this machine's zone, with milliseconds and the distance from UTC."""
    return instant.astimezone().isoformat(sep=" ", timespec="milliseconds") if instant else "-"


def zone_name() -> str:
    """The name of this machine's zone."""
    return tzlocal.get_localzone_name() or time.strftime("%Z")


def every(microseconds: int) -> str:
    """An interval in words."""
    return f"every {duration(microseconds / 1_000_000)}".replace(".0 s", " s")


def memory(size: int | None) -> str:
    """Bytes as MiB."""
    return "-" if size is None else f"{size / 2**20:.1f} MiB"


def pretty(value: Any) -> str:
    """A value as readable JSON."""
    return json.dumps(as_json(value), ensure_ascii=False, indent=2, default=str)


def width_of(text: str) -> int:
    """How many places a text takes on a terminal: East Asian characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def plain(seconds: timedelta) -> str:
    """A duration in words."""
    return duration(seconds.total_seconds())


def _fitted(columns: Sequence[Column], widths: list[int], room: int) -> list[int]:
    """Widths that fit into ``room``, taken from the widest of the columns that may shrink."""
    widths = list(widths)
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - room
    while excess > 0:
        wide = [index for index, column in enumerate(columns) if column.may_shrink and widths[index] > NARROWEST]
        if not wide:
            break
        widest = max(wide, key=lambda index: widths[index])
        widths[widest] -= 1
        excess -= 1
    return widths


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str]) -> str:
    parts: list[str] = []
    for column, width, cell in zip(columns, widths, cells, strict=True):
        text = _cut(cell, width)
        space = " " * (width - width_of(text))
        parts.append(space + text if column.right else _state(text) + space)
    return _GAP.join(parts).rstrip()


def _cut(text: str, width: int) -> str:
    if width_of(text) <= width:
        return text
    kept = ""
    for letter in text:
        if width_of(kept + letter) > width - 3:
            break
        kept += letter
    return kept + "..."


def _state(text: str) -> str:
    """A state in its colour; everything else as it is."""
    return _styled(text, fg=_COLOURS[text]) if text in _COLOURS else text


def _styled(text: str, **style: Any) -> str:
    """``text`` with colours where a person sees them; click takes them out where nobody does."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return text
    return click.style(text, **style)
