"""Documents: find them, read them as plain text, cut them into chunks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Final

from examples.ragapp.index import Source

SUFFIXES: Final = {".md", ".rst", ".txt", ".html", ".htm", ".json", ".py"}
#: Descriptions of installed packages are documents too, with paths such as ``package:celery``.
PACKAGE: Final = "package:"
LARGEST: Final = 5_000_000
CHUNK: Final = 1_200


class DocumentNotFound(LookupError):  # noqa: N818 - "document not found" is what people say
    """There is no such document, or its source is gone."""


class ProcessingError(Exception):
    """A document is there and cannot be read; later it may be, if somebody was still writing it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What a document says."""

    title: str
    body: str


def find(places: Iterable[Path], *, packages: bool = False) -> list[Source]:
    """Everything in ``places`` (files and folders) that can become a document.

    Args:
        places: One that does not exist holds nothing.
        packages: Whether to add the descriptions of the installed Python packages.
    """
    files = {file.resolve() for place in places for file in _files(place)}
    found = [source for file in sorted(files) if (source := file_source(file))]
    return found + sorted(_packages(), key=lambda source: source.path) if packages else found


def file_source(file: Path) -> Source | None:
    """``file`` as a source, or None if it is gone."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return Source(path=str(file), title=file.name, fingerprint=f"{status.st_mtime_ns}-{status.st_size}")


def read(path: str) -> Text:
    """The text of a document.

    Raises:
        DocumentNotFound: Its source is gone.
        ProcessingError: It is too large, empty, or not text.
    """
    name = path.removeprefix(PACKAGE)
    text = _read_package(name) if path.startswith(PACKAGE) else _read_file(Path(path))
    if not text.body.strip():
        raise ProcessingError(f"{path} is empty")
    return text


def chunks(text: str, size: int = CHUNK) -> list[str]:
    """``text`` in pieces of at most ``size`` characters, cut between paragraphs where that is possible."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for start in range(0, len(paragraph), size):
            part = paragraph[start : start + size].strip()
            if pieces and len(pieces[-1]) + len(part) + 2 <= size:
                pieces[-1] += f"\n\n{part}"
            elif part:
                pieces.append(part)
    return pieces


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    for file in place.rglob("*"):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(place).parts)
        if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():
            yield file


def _packages() -> Iterator[Source]:
    seen: set[str] = set()
    for package in metadata.distributions():
        name = package.metadata["Name"]
        if name and name not in seen and len(_description(package)) > 200:
            seen.add(name)
            yield Source(path=f"{PACKAGE}{name}", title=name, fingerprint=package.version)


def _description(package: metadata.Distribution) -> str:
    # Old metadata has the description as a header, newer metadata as the message's body.
    about = package.metadata
    return about["Description"] if "Description" in about else str(about.get_payload())  # type: ignore[attr-defined]


def _read_package(name: str) -> Text:
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise DocumentNotFound(f"the package {name} is not installed any more") from None
    return Text(title=f"{name} {package.version}", body=_description(package))


def _read_file(file: Path) -> Text:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DocumentNotFound(f"{file} does not exist any more") from None
    except OSError as error:
        raise ProcessingError(f"{file} cannot be read: {error}") from error
    if len(content) > LARGEST:
        raise ProcessingError(f"{file} has {len(content):,} bytes; the most that is read is {LARGEST:,}")
    try:
        body = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProcessingError(f"{file} is not UTF-8 text: {error}") from error
    if file.suffix.lower() in {".html", ".htm"}:
        page = _Page()
        page.feed(body)
        page.close()
        return Text(title=page.title.strip() or file.name, body=page.text)
    heading = re.search(r"^#\s+(.+)$", body, re.MULTILINE) if file.suffix.lower() == ".md" else None
    return Text(title=heading[1].strip() if heading else file.name, body=body)


class _Page(HTMLParser):
    """The words of an HTML page that a reader sees, and its title."""

    UNSEEN: Final = frozenset({"script", "style", "template", "noscript"})
    BLOCKS: Final = frozenset({"p", "div", "br", "li", "tr", "pre", "section", "h1", "h2", "h3", "h4", "h5", "h6"})

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self._parts: list[str] = []
        self._inside: list[str] = []

    @property
    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self._parts).splitlines())
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.UNSEEN or tag == "title":
            self._inside.append(tag)
        elif tag in self.BLOCKS:
            self._parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            self._inside.remove(tag)

    def handle_data(self, data: str) -> None:
        if "title" in self._inside:
            self.title += data
        elif not self._inside:
            self._parts.append(data)
