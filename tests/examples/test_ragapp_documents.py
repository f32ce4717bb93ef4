"""Documents of every kind are found, read and cut into chunks."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.ragapp import documents, settings
from examples.ragapp.documents import DocumentNotFound, ProcessingError


def test_find_takes_text_files_and_leaves_the_rest(tmp_path: Path) -> None:
    """Files of known kinds are found in all folders, except hidden ones; a place that is not there is empty."""
    for name in ("a.md", "b.txt", "deep/c.html", ".git/d.md", "__pycache__/e.py", "f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")

    found = documents.find([tmp_path, tmp_path / "a.md", tmp_path / "nothing"])

    assert [Path(source.path).name for source in found] == ["a.md", "b.txt", "c.html"]


def test_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    """A file that was written again has another fingerprint and the same id."""
    page = tmp_path / "page.md"
    page.write_text("short")
    (before,) = documents.find([page])

    page.write_text("somewhat longer")

    (after,) = documents.find([page])
    assert after.document_id == before.document_id
    assert after.fingerprint != before.fingerprint


def test_installed_packages_are_documents() -> None:
    """The long description of a package that is installed can be found and read."""
    found = {source.title: source for source in documents.find([], packages=True)}

    text = documents.read(found["celery"].path)

    assert text.title.startswith("celery 5")
    assert "distributed" in text.body.lower()


def test_the_project_describes_itself() -> None:
    """By default the application reads the documentation of the project that it belongs to."""
    config = settings.read({})

    names = {Path(source.path).name for source in documents.find(config.documents, packages=config.packages)}

    assert "README.md" in names
    assert len(names) > 20


def test_html_is_read_as_a_reader_sees_it(tmp_path: Path) -> None:
    """Tags, scripts and styles are not text; the title and entities are."""
    page = tmp_path / "page.html"
    page.write_text(
        "<html><head><title>A &amp; B</title><style>p {}</style></head><body><h1>Head</h1><p>One <b>two</b>\nthree</p>"
        "<script>alert(1)</script><ul><li>four</li><li>five</li></ul></body></html>"
    )

    text = documents.read(str(page))

    assert text.title == "A & B"
    assert text.body.split() == ["Head", "One", "two", "three", "four", "five"]
    assert "\n" in text.body


def test_title_of_markdown_is_its_first_heading(tmp_path: Path) -> None:
    """A Markdown file is called what its heading says, and by its name without one."""
    page = tmp_path / "page.md"
    page.write_text("intro\n\n# The heading \n\ntext")
    plain = tmp_path / "plain.md"
    plain.write_text("only text")

    assert documents.read(str(page)).title == "The heading"
    assert documents.read(str(plain)).title == "plain.md"


def test_file_that_is_gone_is_not_found(tmp_path: Path) -> None:
    """Reading what is not there says so, for files and for packages."""
    with pytest.raises(DocumentNotFound, match="does not exist"):
        documents.read(str(tmp_path / "gone.md"))
    with pytest.raises(DocumentNotFound, match="not installed"):
        documents.read("package:no-such-package-anywhere")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe\x00broken", "not UTF-8"), (b" \n\n", "is empty"), (b"x" * 5_000_001, "5,000,001")],
)
def test_file_that_is_no_text_cannot_be_processed(tmp_path: Path, content: bytes, reason: str) -> None:
    """A file that is binary, empty or huge is an error that says what is wrong with it."""
    page = tmp_path / "page.txt"
    page.write_bytes(content)

    with pytest.raises(ProcessingError, match=reason):
        documents.read(str(page))


def test_chunks_keep_all_text_and_their_size() -> None:
    """Every word is in one chunk, paragraphs stay together while they fit, and no chunk is too long."""
    text = "# Head\n\n" + "\n\n".join(f"paragraph {number} " + "word " * number for number in range(60))

    pieces = documents.chunks(text, size=200)

    assert all(0 < len(piece) <= 200 for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert pieces[0].startswith("# Head\n\nparagraph 0")


def test_chunks_of_nothing_are_none() -> None:
    """Blank text has no chunks."""
    assert documents.chunks(" \n\n \n") == []
