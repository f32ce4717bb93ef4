"""The task functions, called inline: what they do, and how they fail."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterator
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace

import pytest
from celery import Celery

from examples.ragapp import documents, mail, tasks
from examples.ragapp.documents import ProcessingError
from examples.ragapp.index import DocumentStatus, Index
from examples.ragapp.llm import LLMError
from examples.ragapp.mail import MailboxError
from examples.ragapp.settings import ServicesNotRunningError, Settings
from examples.ragapp.stub_llm import StubModel
from tests.processes import app_in_this_process


@pytest.fixture
def app(config: Settings, index: Index, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The tasks work on a home of their own; there are no services."""
    monkeypatch.setattr(tasks, "SETTINGS", config)
    monkeypatch.setattr(tasks, "INDEX", index)
    return config


@pytest.fixture
def serviced(
    app: Settings, model: StubModel, mail_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """The tasks have a language model and a mail server."""
    config = dataclasses.replace(app, llm_url=model.url, smtp=f"{mail_server[0]}:{mail_server[1]}")
    monkeypatch.setattr(tasks, "SETTINGS", config)
    return config


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Celery]:
    """An empty ledger, and a broker that is this process's memory."""
    (tmp_path / "celeryconfig.py").write_text("broker_url = 'memory://'\nresult_backend = 'cache+memory://'\n")
    with app_in_this_process(tmp_path, {"LLMTASKS_HOME": str(tmp_path / "llmtasks")}, tasks.__name__) as celery:
        yield celery


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of documents that were queued, instead of a broker."""
    ids: list[str] = []

    async def queue(doc_ids: list[str]) -> int:
        ids.extend(doc_ids)
        tasks.INDEX.mark_queued(doc_ids)
        return len(doc_ids)

    monkeypatch.setattr(tasks, "queue", queue)
    return ids


def put(config: Settings, name: str, content: bytes | str) -> Path:
    """Write a file into the folder of documents."""
    file = config.documents[0] / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def note(index: Index, file: Path) -> str:
    """Put the file into the index; return its document's id."""
    source = documents.file_source(file.resolve())
    assert source is not None
    index.note([source])
    return source.document_id


def status_of(index: Index, doc_id: str) -> DocumentStatus:
    document = index.get(doc_id)
    assert document is not None
    return document.status


def mails(config: Settings) -> list[EmailMessage]:
    """What the mail server has delivered."""
    files = sorted((config.maildir / "new").iterdir())
    return [message_from_bytes(file.read_bytes(), policy=policy.default) for file in files]


async def test_a_processed_document_can_be_found(app: Settings, index: Index) -> None:
    """After process_document, a search finds the document's text; a second time changes nothing."""
    doc_id = note(index, put(app, "fruit.md", "# Fruit\n\nApples are red."))

    assert await tasks.process_document(doc_id) == "Fruit: 1 chunks"
    assert await tasks.process_document(doc_id) == "Fruit: unchanged"

    assert index.search("apples")[0].title == "Fruit"
    assert status_of(index, doc_id) is DocumentStatus.PROCESSED


async def test_a_document_that_is_gone_is_an_end_and_no_failure(app: Settings, index: Index) -> None:
    """An unknown id and a deleted file are reported, not tried again."""
    file = put(app, "fruit.md", "Apples")
    doc_id = note(index, file)
    file.unlink()

    assert (await tasks.process_document("nothing")).startswith("not found")
    assert (await tasks.process_document(doc_id)).startswith("not found")

    assert status_of(index, doc_id) is DocumentStatus.MISSING


async def test_a_broken_document_fails_until_it_is_repaired(app: Settings, index: Index) -> None:
    """What cannot be read raises, so that it is retried; a retry after the repair succeeds."""
    file = put(app, "broken.txt", b"\xff\xfe")
    doc_id = note(index, file)
    with pytest.raises(ProcessingError, match="UTF-8"):
        await tasks.process_document(doc_id)

    file.write_text("repaired")

    assert await tasks.process_document(doc_id) == "broken.txt: 1 chunks"


async def test_the_admin_is_told_of_a_document_that_failed(serviced: Settings, index: Index) -> None:
    """After the last attempt the document is marked as failed and the admin has mail that says why."""
    doc_id = note(index, put(serviced, "broken.txt", b"\xff"))
    run = SimpleNamespace(id="run-1", func_name="process_document", args=[doc_id], kwargs={}, attempt=4)

    await tasks.document_failed(run, ProcessingError("it is no text"))

    assert status_of(index, doc_id) is DocumentStatus.FAILED
    (message,) = mails(serviced)
    assert message["To"] == serviced.admin
    assert "process_document failed: it is no text" in message["Subject"]
    assert "run-1, attempt 4" in message.get_content()


async def test_an_admin_who_cannot_be_told_is_logged(app: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Where mail does not work either, the news is in the log, and nothing is raised."""
    await tasks.notify_admin("the house is on fire", "run")

    assert "the house is on fire" in caplog.text


async def test_a_folder_is_ingested_in_steps(
    app: Settings, index: Index, queued: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than one step is queued at a time; each call queues as much as was processed since."""
    monkeypatch.setattr(tasks, "SETTINGS", dataclasses.replace(app, step=2))
    for number in range(5):
        put(app, f"{number}.md", f"document number {number}")

    assert await tasks.ingest_folder() == {"found": 5, "changed": 5, "gone": 0, "queued": 2}
    assert await tasks.ingest_folder() == {"found": 5, "changed": 0, "gone": 0, "queued": 0}
    for _ in range(3):
        for doc_id in queued:
            await tasks.process_document(doc_id)
        await tasks.ingest_folder()

    assert len(queued) == len(set(queued)) == 5
    assert index.counts() == {"processed": 5}


async def test_queued_documents_are_messages_and_are_marked(app: Settings, index: Index, ledger: Celery) -> None:
    """Queueing sends one message for each document, then writes down that it is queued."""
    ids = [note(index, put(app, f"{number}.md", f"document {number}")) for number in range(3)]

    assert await tasks.queue(ids) == 3

    with ledger.connection() as connection, connection.SimpleQueue("celery") as messages:
        assert [messages.get_nowait().payload[0][0] for _ in ids] == ids
    assert index.counts() == {"queued": 3}


async def test_a_deleted_file_leaves_the_index(app: Settings, index: Index, queued: list[str]) -> None:
    """The next look at the folder drops what is gone, and a changed file is queued again."""
    gone, changed = put(app, "gone.md", "apples"), put(app, "changed.md", "pears")
    await tasks.ingest_folder()
    for doc_id in queued:
        await tasks.process_document(doc_id)
    gone.unlink()
    changed.write_text("cherries instead")

    assert await tasks.ingest_folder() == {"found": 1, "changed": 1, "gone": 1, "queued": 1}

    assert index.search("apples") == []


async def test_documents_sent_by_mail_are_queued(serviced: Settings, index: Index, queued: list[str]) -> None:
    """A mail with an attachment becomes a document that is processed; the next look brings nothing."""
    message = mail.compose("bob@example.org", "ann@example.org", "plans", "see attachment")
    message.add_attachment("# Plan\n\nPlant cherries.", filename="plan.md")
    await asyncio.to_thread(mail.send, message, *str(serviced.smtp).split(":"))

    first = await tasks.sync_emails()
    second = await tasks.sync_emails()

    assert (list(first.values()), list(second.values())) == ([1], [0])
    assert await tasks.process_document(queued[0]) == "Plan: 1 chunks"


async def test_a_mailbox_that_cannot_be_read_is_a_failure(app: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """sync_emails logs and raises what is wrong with the mailbox, so that it is tried again."""
    with pytest.raises(MailboxError, match=str(app.maildir)):
        await tasks.sync_emails()

    assert "mail could not be read" in caplog.text


async def test_a_question_is_answered_from_the_documents(serviced: Settings, index: Index) -> None:
    """The answer is quoted from the index and names its sources."""
    await tasks.process_document(note(index, put(serviced, "fruit.md", "# Fruit\n\nApples are red in autumn.")))

    answer = await tasks.answer_question("When are apples red?")

    assert answer == {"answer": "Apples are red in autumn. [1]", "sources": ["Fruit"]}


async def test_a_question_about_nothing_needs_no_model(app: Settings) -> None:
    """Without any hit the model is not asked, so it need not even run."""
    assert (await tasks.answer_question("Apples?"))["sources"] == []


async def test_a_refused_question_is_a_failure(serviced: Settings, index: Index, model: StubModel) -> None:
    """An endpoint that refuses the key makes the task fail with what it said."""
    await tasks.process_document(note(index, put(serviced, "fruit.md", "Apples are red in autumn.")))
    model.key = "another"

    with pytest.raises(LLMError, match=r"401.*API key"):
        await tasks.answer_question("When are apples red?")


async def test_the_report_is_kept_and_mailed(
    serviced: Settings, index: Index, queued: list[str], ledger: Celery
) -> None:
    """The report tells what the index holds; it is a page, and a mail whose attachment becomes a document itself."""
    await tasks.process_document(note(index, put(serviced, "fruit.md", "# Fruit | Salad\n\nApples.")))

    page = await tasks.generate_daily_report()

    assert "<td>Fruit | Salad</td>" in Path(page).read_text()
    (message,) = mails(serviced)
    (attachment,) = message.iter_attachments()
    assert attachment.get_filename() == "report.md"
    assert r"| Fruit \| Salad | processed |" in attachment.get_content()
    assert list((await tasks.sync_emails()).values()) == [1]
    assert len(queued) == 1


async def test_a_report_that_fails_is_told(app: Settings, ledger: Celery, caplog: pytest.LogCaptureFixture) -> None:
    """Without a mail server the report is an error that is raised, after an attempt to tell the admin."""
    with caplog.at_level(logging.ERROR), pytest.raises(ServicesNotRunningError):
        await tasks.generate_daily_report()

    assert "the report failed" in caplog.text
    assert "the admin could not be told" in caplog.text


async def test_a_slow_job_can_be_cancelled() -> None:
    """The slow job ends when it is cancelled, and does not swallow that."""
    job = asyncio.create_task(tasks.slow_job(seconds=60))
    await asyncio.sleep(0)

    job.cancel()

    with pytest.raises(asyncio.CancelledError):
        await job


async def test_a_short_slow_job_comes_to_its_end() -> None:
    """It says how long it took."""
    assert await tasks.slow_job(seconds=0) == "done after 0 s"
