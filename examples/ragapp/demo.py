"""A user of the running system: queues, asks, pauses, cancels, breaks things, and prints what happens."""

from __future__ import annotations

import asyncio
import contextlib
import email
import email.policy
import itertools
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from examples.ragapp import documents, tasks
from examples.ragapp.tasks import INDEX, SETTINGS
from llmtasks import Task, TaskMonitor
from llmtasks.states import ENDED, RunState, ScheduleState

#: What a step waits for must have happened after this many seconds.
PATIENCE: Final = 90.0
PAUSE: Final = 10.0
MOST_QUESTIONS: Final = 60
#: Where unread mail is, if it is the local mail server that delivers it.
MAILBOX: Final = SETTINGS.maildir / "new"
AWAY: Final = SETTINGS.maildir / "away"
REPORT: Final = "report while you watch"
QUESTIONS: Final = (
    "How do I pause a schedule?",
    "What happens to a run when its worker is killed?",
    "Which time zones does a cron expression use?",
    "Does httpx support HTTP/2?",
    "What is a task queue?",
    "How are database migrations written with Alembic?",
    "任务失败后如何重试?",
)


class DemoError(Exception):
    """Something did not happen that should have."""


async def run(*, once: bool) -> None:
    """Go through all steps; then, unless ``once``, go on asking questions for a while, and idle.

    Raises:
        DemoError: With ``once``: a step failed.
    """
    give_mailbox_back()
    await until(workers_are_up, "no worker has started: is `celery worker` running?")
    failed = [step.__name__ for number, step in enumerate(STEPS, start=1) if not await succeeds(step, number)]
    if once and failed:
        raise DemoError(f"these steps failed: {', '.join(failed)}")
    say("all steps done" if not failed else f"all steps done, but these failed: {', '.join(failed)}")
    if once:
        return
    for question in itertools.islice(itertools.cycle(QUESTIONS), MOST_QUESTIONS):
        await asyncio.sleep(PAUSE)
        with contextlib.suppress(DemoError):
            await ask(question)
    say("enough questions; idle until somebody stops this")
    await asyncio.Event().wait()


async def succeeds(step: Callable[[], Awaitable[None]], number: int) -> bool:
    """Take one step; say whether it went as it should."""
    say(f"-- {number}. {step.__doc__}")
    try:
        await step()
    except DemoError as error:
        say(f"   PROBLEM: {error}")
        return False
    return True


async def put_documents() -> None:
    """Put a document into the inbox, and wait until it can be searched."""
    write("inbox.md", b"# The inbox\n\nThe secret ingredient of the demo is cardamom.\n")
    await ended((await tasks.ingest_folder.adelay()).id)
    await until(inbox_is_searchable, "the document in the inbox was not indexed")
    say(f"index: {INDEX.counts()}")


async def ask_questions() -> None:
    """Ask two questions; the answers are quoted from the documents."""
    await ask("What is the secret ingredient?")
    await ask(QUESTIONS[0])


async def one_off() -> None:
    """Have one document processed two seconds from now."""
    document = INDEX.recent(limit=1)[0]
    task = Task(
        name="one_time_task",
        func_name="process_document",
        params={"doc_id": document.id},
        scheduled_at=datetime.now() + timedelta(seconds=2),
    )
    await task.save()
    say(f"saved {task.name!r} for {task.next_run_at}")
    task_id = str(task.id)

    async def has_fired() -> bool:
        return (await Task.get(task_id)).state == ScheduleState.COMPLETED

    await until(has_fired, "the one-off did not fire")
    say(f"{task.name!r} has fired")


async def periodic() -> None:
    """Have a report every half minute; pause that, run it by hand, resume it."""
    task = await report_task()
    await task.pause()
    say(f"{task.name!r} is {task.state}, next run {task.next_run_at}")
    run = await task.execute_now()
    await ended(run.id)
    await task.resume()
    say(f"{task.name!r} is {task.state}, next runs {[f'{at:%H:%M:%S}' for at in task.next_runs(3)]}")


async def cancel_while_running() -> None:
    """Start a slow job and cancel it while it runs."""
    job = await tasks.slow_job.adelay(seconds=60)
    await until(lambda: is_in(job.id, RunState.RUNNING), "the slow job did not start")
    say(f"slow_job {job.id} is running")
    await Task.cancel_run(job.id)
    await ended(job.id, RunState.CANCELLED)


async def not_found() -> None:
    """Process a document that does not exist: an error in the log, and no retry."""
    await ended((await tasks.process_document.adelay("no-such-document")).id)


async def broken_document() -> None:
    """Process a document that is no text: it fails, is retried, fails for good, and the admin is told by mail."""
    source = documents.file_source(write("broken.txt", b"\xff\xfe\x00 no text"))
    assert source is not None
    INDEX.note([source])
    told = mails_about("broken.txt")
    await ended((await tasks.process_document.adelay(source.document_id)).id, RunState.FAILED)

    async def told_again() -> bool:
        return mails_about("broken.txt") > told

    if MAILBOX.exists():
        await until(told_again, "the admin was not told")
        say("the admin has mail about it")


async def mailbox_gone() -> None:
    """Take the mailbox away for a moment: reading it fails, and a retry succeeds."""
    if not MAILBOX.exists():
        say("left out: mail is read elsewhere")
        return
    MAILBOX.rename(AWAY)
    try:
        run = await tasks.sync_emails.adelay()
        await until(lambda: is_in(run.id, RunState.RETRYING), "sync_emails did not fail")
        say("sync_emails is retrying; the mailbox is back")
    finally:
        give_mailbox_back()
    await ended(run.id)


async def timeout() -> None:
    """Give a slow job two seconds."""
    task = Task(
        name="too slow",
        func_name="slow_job",
        params={"seconds": 60},
        timeout=2,
        max_retries=0,
        scheduled_at=datetime.now() + timedelta(hours=1),
    )
    await task.save()
    run = await task.execute_now()
    await ended(run.id, RunState.FAILED)
    await task.cancel()


async def look_at_ledger() -> None:
    """Read in the ledger what ran so far."""
    for function in (await TaskMonitor.get_statistics()).functions:
        counts = ", ".join(f"{count} {state}" for state, count in function.by_state.items() if count)
        say(f"{function.func_name}: {counts}, {function.retries} retries")


STEPS: Final[tuple[Callable[[], Awaitable[None]], ...]] = (
    put_documents,
    ask_questions,
    one_off,
    periodic,
    cancel_while_running,
    not_found,
    broken_document,
    mailbox_gone,
    timeout,
    look_at_ledger,
)


async def ask(question: str) -> None:
    """Ask ``question`` and print the answer."""
    say(f"? {question}")
    result = await tasks.answer_question.adelay(question)
    await ended(result.id)
    answer: dict[str, Any] = await asyncio.to_thread(result.get, timeout=PATIENCE)
    say(f"! {answer['answer']}")


async def report_task() -> Task:
    """The Task that writes a report every half minute; made when the demo runs for the first time."""
    known = await Task.list(name=REPORT, states=[ScheduleState.ACTIVE, ScheduleState.PAUSED])
    if known:
        return known[0]
    task = Task(name=REPORT, func_name="generate_report", interval_minutes=0.5, next_run_at=datetime.now())
    return await task.save()


async def ended(run_id: str, expected: RunState = RunState.SUCCEEDED) -> None:
    """Wait until the run has ended, say how, and see that it is as expected."""
    await until(lambda: is_in(run_id, *ENDED), f"run {run_id} did not end")
    status = await TaskMonitor.get_task_status(run_id)
    say(f"{status.name} {run_id[:8]} {status.state} after {status.attempts} attempts {status.error or ''}")
    if status.state != expected:
        raise DemoError(f"run {run_id} of {status.name} is {status.state}, expected {expected}: {status.error}")


async def is_in(run_id: str, *states: RunState) -> bool:
    """Whether the run is in one of ``states``."""
    return (await TaskMonitor.get_task_status(run_id)).state in states


async def workers_are_up() -> bool:
    """Whether a worker lives."""
    return bool((await TaskMonitor.get_statistics()).workers)


async def inbox_is_searchable() -> bool:
    """Whether the document that the demo put into the inbox can be found."""
    return any("cardamom" in hit.text for hit in INDEX.search("cardamom"))


async def until(condition: Callable[[], Awaitable[bool]], problem: str) -> None:
    """Wait until ``condition`` holds.

    Raises:
        DemoError: It does not hold after a long time; the error is ``problem``.
    """
    deadline = time.monotonic() + PATIENCE
    while not await condition():
        if time.monotonic() > deadline:
            raise DemoError(problem)
        await asyncio.sleep(0.25)


def write(name: str, content: bytes) -> Path:
    """Put a file into the inbox."""
    SETTINGS.inbox.mkdir(parents=True, exist_ok=True)
    file = SETTINGS.inbox / name
    file.write_bytes(content)
    return file


def mails_about(word: str) -> int:
    """How many mails in the mailbox, read or not, have ``word`` in their subject."""
    files = [file for folder in ("new", "cur") for file in (SETTINGS.maildir / folder).glob("*")]
    mails = (email.message_from_bytes(file.read_bytes(), policy=email.policy.default) for file in files)
    return sum(word in str(message["Subject"]) for message in mails)


def give_mailbox_back() -> None:
    """Undo what ``mailbox_gone`` did, also where it was killed in the middle."""
    if AWAY.exists():
        AWAY.rename(MAILBOX)


def say(text: str) -> None:
    """Print a line, at once."""
    print(text, flush=True)
