"""The Procfile: which processes belong together, and the command line of each."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from llmtasks.errors import ConfigurationError

#: What runs where there is no Procfile.
DEFAULT: Final = """\
worker: celery worker --loglevel INFO
beat: celery beat --loglevel INFO
flower: celery flower --address=127.0.0.1 --port=5555
"""

_LINE = re.compile(r"([A-Za-z0-9_-]+)\s*:\s*(\S.*)")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")


class Kind(StrEnum):
    """What an entry runs, as far as it matters to know."""

    WORKER = "worker"
    BEAT = "beat"
    FLOWER = "flower"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a Procfile.

    Attributes:
        name: What stands before the colon.
        words: The command, split as a shell would, variables not yet filled in.
        variables: What stands before the command as ``NAME=value``.
    """

    name: str
    words: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def kind(self) -> Kind:
        """Told by the command, not by the name."""
        if self.words[0] == "celery":
            for word in self.words[1:]:
                if word in {Kind.WORKER, Kind.BEAT, Kind.FLOWER}:
                    return Kind(word)
        return Kind.OTHER

    def option(self, name: str, environ: Mapping[str, str]) -> str:
        """The value of ``--name=value`` or ``--name value``, or an empty text; the last one counts."""
        words, value = [_filled(word, environ) for word in self.words], ""
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word == f"--{name}":
                value = following
            elif word.startswith(f"--{name}="):
                value = word.partition("=")[2]
        return value

    def command(self, environ: Mapping[str, str], *, app: str | None = None, extra: Sequence[str] = ()) -> list[str]:
        """The program and its arguments.

        ``celery`` is run by this Python, so that it works in a virtual environment that is not activated.

        Args:
            environ: Values of ``$NAME``, ``${NAME}`` and ``${NAME:-default}``.
            app: The Celery app, for an entry that names none.
            extra: Options to add at the end.
        """
        words = [*(_filled(word, environ) for word in self.words), *extra]
        if words[0] != "celery":
            return words
        named = any(word in {"-A", "--app"} or word.startswith(("-A", "--app=")) for word in words)
        return [sys.executable, "-m", "celery", *(["-A", app] if app and not named else []), *words[1:]]


def read(path: Path | None) -> list[Entry]:
    """Entries of ``path``, else of the current folder's Procfile, else of `DEFAULT`.

    Raises:
        ConfigurationError: A line cannot be read, or there is none.
    """
    path = path or Path("Procfile")
    return parse(path.read_text(), str(path)) if path.exists() else parse(DEFAULT, "the built-in Procfile")


def parse(text: str, source: str) -> list[Entry]:
    """Entries in their order; empty lines and lines that begin with ``#`` are left out.

    Raises:
        ConfigurationError: A line cannot be read, a name stands twice, or there is no line.
    """
    entries: dict[str, Entry] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise ConfigurationError(f"{source}, line {number}: {line!r}: expected 'name: command'")
        name, command = found.groups()
        if name in entries:
            raise ConfigurationError(f"{source}, line {number}: {name!r} stands there twice: give it another name")
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ConfigurationError(f"{source}, line {number}: {command!r} cannot be read: {error}") from error
        variables: dict[str, str] = {}
        while words and (assigned := _ASSIGNMENT.fullmatch(words[0])):
            variables[assigned[1]] = assigned[2]
            words = words[1:]
        if not words:
            raise ConfigurationError(f"{source}, line {number}: {line!r}: expected a command after the colon")
        entries[name] = Entry(name=name, words=words, variables=variables)
    if not entries:
        raise ConfigurationError(f"{source} names no process: expected lines such as 'worker: celery worker'")
    return list(entries.values())


def environment(entry: Entry, home: Path | None) -> dict[str, str]:
    """What the process of ``entry`` finds in its environment."""
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", **entry.variables}
    # Programs of this virtual environment are found where it is not activated.
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)])
    if home is not None:
        environ["LLMTASKS_HOME"] = str(home)
    return environ


def _filled(word: str, environ: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda found: environ.get(found[1] or found[2]) or found[3] or "", word)
