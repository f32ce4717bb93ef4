"""The tasks: documents, mail, reports and questions.

A task function says what to do; its registration says how it is tried again, timed out and limited. That it may run
twice without harm is the function's own business, and the index and the mailbox are written for that.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from examples.ragapp import documents, llm, mail, report, settings
from examples.ragapp.documents import DocumentNotFound, ProcessingError
from examples.ragapp.index import Document, DocumentStatus, Index
from examples.ragapp.mail import Account, MailboxError
from examples.ragapp.report import Report
from llmtasks import TaskMonitor, task_registry, track_task_performance

if TYPE_CHECKING:
    from llmtasks import Run

logger = logging.getLogger(__name__)

SETTINGS: Final = settings.read()
INDEX: Final = Index(SETTINGS.index_path)


# What happens when a task has failed for good


async def notify_admin(subject: str, text: str) -> None:
    """Tell the admin by mail. Where that does not work, the log has to do: there is nobody else to tell."""
    message = mail.compose(SETTINGS.sender, SETTINGS.admin, subject, text)
    try:
        server = settings.addresses(SETTINGS)
        await asyncio.to_thread(mail.send, message, server.smtp_host, server.smtp_port)
    except (OSError, settings.ServicesNotRunningError) as error:
        logger.error("the admin could not be told %r: %s", subject, error)


async def tell_admin(task: Run, error: BaseException) -> None:
    """Tell the admin that a run has failed and will not be tried again."""
    text = f"{task.func_name} {task.args} {task.kwargs}\nrun {task.id}, attempt {task.attempt}\n\n{error!r}\n"
    await notify_admin(f"{task.func_name} failed: {error}", text)


async def document_failed(task: Run, error: BaseException) -> None:
    """Write down that a document could not be processed, and tell the admin."""
    doc_id = task.kwargs.get("doc_id") or task.args[0]
    await update_document_status(doc_id, DocumentStatus.FAILED)
    await tell_admin(task, error)


# Documents


@task_registry.register(
    name="process_document",
    config={"timeout": 1800, "max_retries": 3, "retry_delay": SETTINGS.retry_delay, "max_instances": 4},
    on_failure=document_failed,
)
@track_task_performance
async def process_document(doc_id: str) -> str:
    """Make the document searchable; return what became of it."""
    try:
        document = await get_document(doc_id)
        return await process_content(document)
    except DocumentNotFound as error:
        # Trying again would not bring it back.
        logger.error("document not found: %s", error)
        await update_document_status(doc_id, DocumentStatus.MISSING)
        return f"not found: {error}"
    except ProcessingError as error:
        logger.error("processing failed: %s", error)
        raise


async def get_document(doc_id: str) -> Document:
    """The document with this id."""
    document = await asyncio.to_thread(INDEX.get, doc_id)
    if document is None:
        raise DocumentNotFound(f"the index knows no document {doc_id!r}")
    return document


async def process_content(document: Document) -> str:
    """Read the document, cut it into chunks and put them into the index, in place of its old ones."""
    text = await asyncio.to_thread(documents.read, document.path)
    chunks = documents.chunks(text.body)
    changed = await asyncio.to_thread(INDEX.replace, document.id, text.title, chunks)
    return f"{text.title}: {len(chunks)} chunks" if changed else f"{text.title}: unchanged"


async def update_document_status(doc_id: str, status: DocumentStatus) -> None:
    """Set the status of a document."""
    await asyncio.to_thread(INDEX.set_status, doc_id, status)


@task_registry.register(
    name="ingest_folder",
    interval_minutes=SETTINGS.interval_minutes,
    max_instances=1,
    max_retries=1,
    retry_delay=SETTINGS.retry_delay,
    timeout=300,
    on_failure=tell_admin,
)
async def ingest_folder() -> dict[str, int]:
    """Look for documents that are new, changed or gone, and queue the next step of those that need work.

    No more than ``SETTINGS.step`` documents are queued at a time: a folder of a million does not flood the broker, and
    questions are not kept waiting.
    """
    began = datetime.now(UTC)
    places = [*SETTINGS.documents, SETTINGS.inbox, SETTINGS.attachments]
    found = await asyncio.to_thread(documents.find, places, packages=SETTINGS.packages)
    changed = await asyncio.to_thread(INDEX.note, found)
    gone = await asyncio.to_thread(INDEX.drop_missing, found, began)
    queued = await queue(await asyncio.to_thread(INDEX.unprocessed, SETTINGS.step))
    return {"found": len(found), "changed": changed, "gone": gone, "queued": queued}


async def queue(doc_ids: list[str]) -> int:
    """Queue documents for processing; say how many."""
    await asyncio.to_thread(process_document.map_delay, doc_ids)
    # After sending: were it before and we stopped in between, nobody would ever send them. Sent twice does no harm.
    await asyncio.to_thread(INDEX.mark_queued, doc_ids)
    return len(doc_ids)


# Mail


@task_registry.register(
    name="sync_emails",
    interval_minutes=SETTINGS.interval_minutes,
    max_instances=1,
    max_retries=3,
    retry_delay=SETTINGS.retry_delay,
    timeout=300,
    on_failure=tell_admin,
)
async def sync_emails() -> dict[str, int]:
    """Read all mailboxes; return how many new messages each had."""
    try:
        accounts = await get_active_email_accounts()
        return {account.name: await sync_account_emails(account) for account in accounts}
    except MailboxError as error:
        logger.error("mail could not be read: %s", error)
        raise


async def get_active_email_accounts() -> list[Account]:
    """The mailboxes to read."""
    return [Account(url) for url in SETTINGS.mailboxes]


async def sync_account_emails(account: Account) -> int:
    """Read one mailbox, queue the documents that came with its messages, and return how many messages were new."""
    synced = await asyncio.to_thread(mail.sync, account, INDEX, SETTINGS.attachments)
    await queue(synced.document_ids)
    return synced.messages


# Reports


@task_registry.register(
    name="generate_report",
    schedule=SETTINGS.report_schedule,
    max_instances=1,
    max_retries=2,
    retry_delay=SETTINGS.retry_delay,
    timeout=300,
)
async def generate_daily_report() -> str:
    """Write the report, keep it as a file, and mail it to the admin; return the file's path."""
    try:
        data = await collect_daily_data()
        file = await asyncio.to_thread(save_report, data)
        await send_report_email(data)
    except Exception as error:
        logger.error("the report failed: %s", error)
        await notify_admin("report failed", str(error))
        raise
    return file


async def collect_daily_data() -> Report:
    """What the index holds and what the tasks did."""
    statistics = await TaskMonitor.get_statistics()
    tables = await asyncio.to_thread(report.index_tables, INDEX)
    title = f"Report of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return Report(title=title, tables=[*tables, *report.ledger_tables(statistics)])


def save_report(data: Report) -> str:
    """Write the report into its folder; return the path of its HTML page."""
    SETTINGS.reports.mkdir(parents=True, exist_ok=True)
    (SETTINGS.reports / "report.md").write_text(data.markdown)
    page = SETTINGS.reports / "report.html"
    page.write_text(data.html)
    return str(page)


async def send_report_email(data: Report) -> None:
    """Mail the report to the admin, with the Markdown as an attachment."""
    message = mail.compose(SETTINGS.sender, SETTINGS.admin, data.title, data.markdown, data.html)
    message.add_attachment(data.markdown, subtype="markdown", filename="report.md")
    server = settings.addresses(SETTINGS)
    await asyncio.to_thread(mail.send, message, server.smtp_host, server.smtp_port)


# Questions


@task_registry.register(
    name="answer_question",
    config={"timeout": 120, "max_retries": 2, "retry_delay": SETTINGS.retry_delay, "priority": 1},
    on_failure=tell_admin,
)
@track_task_performance
async def answer_question(question: str) -> dict[str, Any]:
    """Answer ``question`` from the documents in the index.

    The call of the language model has its own quick retries (``llm.ask``); the task's retries come after those.
    """
    hits = await asyncio.to_thread(INDEX.search, question)
    if not hits:
        return {"answer": "No document says anything about that.", "sources": []}
    url = settings.addresses(SETTINGS).llm_url
    answer = await llm.ask(question, hits, url=url, key=SETTINGS.llm_key, model=SETTINGS.llm_model)
    return {"answer": answer, "sources": [hit.title for hit in hits]}


# Something long, to cancel or to kill


@task_registry.register(name="slow_job", max_retries=3, retry_delay=1, timeout=3600, on_failure=tell_admin)
async def slow_job(seconds: float = 60) -> str:
    """Do nothing for a while, and say so once a second."""
    try:
        for second in range(int(seconds)):
            logger.info("slow job: second %d of %d", second + 1, seconds)
            await asyncio.sleep(1)
    except asyncio.CancelledError:
        # Cancelled or out of time: the place to undo what was begun. It must end now, so this is raised again.
        logger.info("slow job: stopped")
        raise
    return f"done after {seconds:g} s"
