"""The index keeps documents and finds them, for several processes at once."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from examples.ragapp.index import DocumentStatus, Index, Source


def source(path: str, fingerprint: str = "1") -> Source:
    return Source(path=path, title=path, fingerprint=fingerprint)


def test_search_finds_the_chunk_that_is_about_the_question(index: Index) -> None:
    """The best hit for a question is the chunk that shares its words, with a snippet from it."""
    pauses, prices = source("/pauses.md"), source("/prices.md")
    index.note([pauses, prices])
    index.replace(pauses.document_id, "Pauses", ["A schedule that is paused has no next run until it is resumed."])
    index.replace(prices.document_id, "Prices", ["Apples are cheap.", "Pears are dear."])

    hits = index.search("How do I pause a schedule?")

    assert hits[0].title == "Pauses"
    assert "paused" in hits[0].snippet
    assert hits[0].score >= hits[-1].score


def test_search_finds_chinese_text_by_part_of_a_sentence(index: Index) -> None:
    """Text without spaces between its words is found by any part of it, and is given back as it was written."""
    readme = source("/README.zh-CN.md")
    index.note([readme])
    index.replace(readme.document_id, "说明", ["任务失败后会自动重试三次 (max_retries)。", "邮件每十五分钟同步一次。"])

    hits = index.search("任务重试")

    assert hits[0].text == "任务失败后会自动重试三次 (max_retries)。"


@pytest.mark.parametrize("question", ["", "?!", '"', "NEAR(", "a AND", "col:x*", "'; DROP TABLE chunks"])
def test_no_question_is_a_query_language(index: Index, question: str) -> None:
    """Whatever people type is words to look for, never an error."""
    assert index.search(question) == []


def test_same_text_is_not_indexed_again(index: Index) -> None:
    """Replacing a document's text by the same text changes nothing, another text replaces all of it."""
    page = source("/page.md")
    index.note([page])

    assert index.replace(page.document_id, "Page", ["first", "second"])
    assert not index.replace(page.document_id, "Page", ["first", "second"])
    assert index.replace(page.document_id, "Page", ["third"])

    assert index.totals() == (1, 0)
    assert index.search("second") == []


def test_changed_source_is_processed_again(index: Index) -> None:
    """A source is work to do when it is new and when its fingerprint changes, not when it is merely seen again."""
    page = source("/page.md")
    assert index.note([page]) == 1
    index.replace(page.document_id, "Page", ["text"])

    assert index.note([page]) == 0
    assert index.unprocessed(10) == []
    assert index.note([source("/page.md", fingerprint="2")]) == 1
    assert index.unprocessed(10) == [page.document_id]


def test_no_more_documents_are_queued_than_a_step_allows(index: Index) -> None:
    """What is queued takes room in the step, and gives it back when it is processed."""
    pages = [source(f"/{number}.md") for number in range(5)]
    index.note(pages)
    first = index.unprocessed(3)

    index.mark_queued(first)

    assert len(first) == 3
    assert index.unprocessed(3) == []
    index.replace(first[0], "One", ["text"])
    index.set_status(first[1], DocumentStatus.FAILED)
    assert len(index.unprocessed(3)) == 2


def test_a_document_finished_early_is_not_marked_queued(index: Index) -> None:
    """A worker may be done before the sender has written down that the document is queued."""
    page = source("/page.md")
    index.note([page])
    index.replace(page.document_id, "Page", ["text"])

    index.mark_queued([page.document_id])

    document = index.get(page.document_id)
    assert document is not None
    assert document.status is DocumentStatus.PROCESSED


def test_a_source_that_is_gone_is_not_found_any_more(index: Index) -> None:
    """Dropping what is missing removes its text; a document that comes back is work to do again."""
    page, other = source("/page.md"), source("/other.md")
    index.note([page, other])
    index.replace(page.document_id, "Page", ["text"])

    assert index.drop_missing([other], as_of=datetime.now(UTC)) == 1

    assert index.search("text") == []
    assert index.counts() == {"missing": 1, "new": 1}
    assert index.note([page]) == 1


def test_a_mail_is_noted_once(index: Index) -> None:
    """The second note of one message brings no documents."""
    attachment = source("/attachment.md")

    assert index.note_mail("box", "<1@x>", "Hello", [attachment]) == [attachment.document_id]
    assert index.note_mail("box", "<1@x>", "Hello", [attachment]) is None
    assert index.knows_mail("box", "<1@x>")
    assert not index.knows_mail("other box", "<1@x>")


def test_a_failed_write_leaves_the_index_as_it_was(index: Index) -> None:
    """A replacement that fails half-way leaves the old text searchable."""
    page = source("/page.md")
    index.note([page])
    index.replace(page.document_id, "Page", ["old text"])

    with pytest.raises(TypeError):
        index.replace(page.document_id, "Page", ["new", None])  # type: ignore[list-item]

    assert [hit.text for hit in index.search("old new")] == ["old text"]


WRITER = """
import sys
from pathlib import Path
from examples.ragapp.index import Index, Source

index, who = Index(Path(sys.argv[1])), sys.argv[2]
sources = [Source(path=f"/{who}-{n}.md", title="t", fingerprint="1") for n in range(20)]
for source in sources:
    index.note([source])
    index.replace(source.document_id, "t", [f"words of {who}"])
    assert index.search("words")
"""


def test_processes_may_create_and_write_the_index_at_the_same_moment(tmp_path: Path) -> None:
    """Six processes that start together on no index write all their documents into one."""
    path = tmp_path / "new" / "index.db"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), f"writer{n}"]) for n in range(6)]

    assert [writer.wait(timeout=120) for writer in writers] == [0] * 6

    assert Index(path).counts() == {"processed": 120}
    assert Index(path).totals() == (120, 0)
