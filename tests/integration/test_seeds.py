"""Every code block of the seed text runs as it is written, and causes what the text says it does.

Each block runs in processes of its own, real workers and beats, after a preamble that defines the names it leaves out.
"""

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from llmtasks import Run, Task
from llmtasks.states import RunState, ScheduleState
from llmtasks.triggers import Cron
from tests.ledger import QUICK, Ledger
from tests.processes import REPOSITORY, Project
from tests.seeds.blocks import Block, blocks
from tests.servers import Valkey
from tests.waiting import wait_until

PREAMBLE = """
from llmtasks import task_registry
from tests.notebook import is_open, note, notes
"""
#: Retries at once, where a block leaves their delay to the configuration.
NO_DELAY = 'TASK_CONFIG = {"retry_delay": 0}\n'

pytestmark = pytest.mark.redis


@pytest.fixture
def project(tmp_path: Path, broker: Valkey) -> Iterator[Project]:
    url = f"sqlite:///{tmp_path / 'project' / '.llmtasks' / 'llmtasks.db'}"
    project = Project(tmp_path / "project", broker=broker, database_url=url)
    project.environ.update(QUICK)
    yield project
    project.close()


def block(heading: str, number: int = 0) -> Block:
    """The block below a heading of the text."""
    return [item for item in blocks() if item.heading == heading][number]


def module(project: Project, written: Block, *, before: str = "", after: str = "") -> None:
    """Make the block a module that workers, beats and this process import."""
    project.tasks(PREAMBLE + before + written.source + after, module="block")


def configure(project: Project, text: str) -> None:
    """Put ``text`` in place of the TASK_CONFIG of the project's celeryconfig.py."""
    path = project.folder / "celeryconfig.py"
    configuration = path.read_text("utf-8")
    begin = configuration.index("TASK_CONFIG = {")
    end = configuration.index("}\n", begin) + 2
    path.write_text(configuration[:begin] + text + configuration[end:], "utf-8")


def run_block(project: Project, written: Block, preamble: str) -> list[Any]:
    """Run a block with ``await`` in it in a process of its own; what ``look()`` returned after each statement."""
    (project.folder / "preamble.py.txt").write_text(preamble, "utf-8")
    (project.folder / "block.py.txt").write_text(written.source, "utf-8")
    done = project.run([sys.executable, "-m", "tests.seeds.blocks", "preamble.py.txt", "block.py.txt"])
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def declared(*names: str) -> dict[str, Task]:
    """The Tasks of these names once a beat has written them."""

    def found() -> dict[str, Task]:
        return {task.name or "": task for task in Task.list_sync()}

    wait_until(lambda: set(names) <= set(found()), 60, f"{names} are declared")
    return {name: found()[name] for name in names}


def execute(ledger: Ledger, task: Task) -> Run:
    return ledger.ends(task.execute_now_sync().id)


def minutes_from_now(instant: datetime | None) -> float:
    assert instant is not None
    return (instant - datetime.now(UTC)) / timedelta(minutes=1)


def test_the_text_has_the_blocks_that_are_tested_here() -> None:
    """A block that is added to the text fails here until it has its test."""
    assert [item.heading for item in blocks()] == [
        "基础任务注册",
        "手动创建任务",
        "任务控制",
        "基础配置",
        "任务特定配置",
        "重试机制",
        "错误回调",
        "任务状态监控",
        "性能指标",
        "邮件同步任务",
        "文档处理任务",
        "定时报告生成",
    ]
    assert all("app." not in item.source for item in blocks())
    assert (REPOSITORY / "tests" / "seeds" / "seed.txt").is_file()


def test_registering_tasks(project: Project, ledger: Ledger) -> None:
    """One runs when it is sent, two are schedules of a day and of a quarter of an hour."""
    module(project, block("基础任务注册"))
    project.worker()
    project.beat()
    sent = project.app.tasks["process_document"].delay("123")

    tasks = declared("daily_report", "sync_emails")

    assert (tasks["daily_report"].interval_minutes, tasks["sync_emails"].interval_minutes) == (1440, 15)
    assert minutes_from_now(tasks["daily_report"].next_run_at) == pytest.approx(1440, abs=2)
    assert minutes_from_now(tasks["sync_emails"].next_run_at) == pytest.approx(15, abs=2)
    assert "process_document" not in {task.name for task in Task.list_sync()}
    run = ledger.ends(sent.id)
    assert (run.state, run.func_name, run.args) == (RunState.SUCCEEDED, "process_document", ["123"])
    assert [execute(ledger, task).state for task in tasks.values()] == [RunState.SUCCEEDED, RunState.SUCCEEDED]
    assert execute(ledger, tasks["sync_emails"]).max_retries == 3


FUNCTIONS = """
@task_registry.register(name="process_document")
async def process_document(doc_id: str):
    note("documents", doc_id)

@task_registry.register(name="sync_emails")
async def sync_emails():
    note("emails", "synced")
"""


def test_creating_tasks(project: Project, ledger: Ledger) -> None:
    """A one-off in an hour is stored with its parameters; an interval that begins now runs at once, and goes on."""
    project.tasks(PREAMBLE + FUNCTIONS)
    project.worker()
    project.beat()

    run_block(project, block("手动创建任务"), "import tasks\n\ndef look(): ...\n")

    ledger.notes("emails", 1)
    assert project.app
    one, periodic = Task.get_sync("one_time_task"), Task.get_sync("periodic_task")
    assert (one.func_name, one.params, one.state) == ("process_document", {"doc_id": "123"}, ScheduleState.ACTIVE)
    assert minutes_from_now(one.next_run_at) == pytest.approx(60, abs=2)
    assert (periodic.interval_minutes, periodic.func_name) == (30, "sync_emails")
    wait_until(lambda: minutes_from_now(Task.get_sync("periodic_task").next_run_at) > 28, 30, "the grid goes on")
    assert ledger.notes_now("emails") == ["synced"]

    one.scheduled_at = datetime.now() + timedelta(seconds=0.3)
    one.save_sync()
    assert ledger.notes("documents", 1) == ["123"]
    wait_until(lambda: Task.get_sync("one_time_task").state is ScheduleState.COMPLETED, 30, "it is over")


CONTROLLED = """
import tasks
from llmtasks import Task
from llmtasks.dispatch import station
from llmtasks.store import runs

task = await Task(name="controlled", func_name="sync_emails", interval_minutes=1 / 60).save()

def look():
    found = Task.get_sync(task.id)
    with station().database.reading() as connection:
        mine = runs.find(connection, station().name, schedule_id=task.id)
    return [found.state, found.next_run_at is not None, [run.id for run in mine if not run.scheduled_for]]
"""


def test_controlling_a_task(project: Project, ledger: Ledger) -> None:
    """Paused it has no next run, resumed it has one, cancelled it is over; executing it by hand works even then."""
    project.tasks(PREAMBLE + FUNCTIONS)
    project.worker()
    project.beat()

    pause, resume, cancel, execute_now = run_block(project, block("任务控制"), CONTROLLED)

    assert pause == ["paused", False, []]
    assert resume == ["active", True, []]
    assert cancel == ["cancelled", False, []]
    assert execute_now[:2] == ["cancelled", False]
    (by_hand,) = execute_now[2]
    assert ledger.ends(by_hand).state is RunState.SUCCEEDED


DEFAULTS = """
import time

@task_registry.register(name="limits", bind=True)
async def limits(self):
    return self.request.timelimit

@task_registry.register(name="fails")
async def fails():
    raise ConnectionError("no")
"""


def test_the_configuration(project: Project, ledger: Ledger) -> None:
    """TASK_CONFIG sets how many runs a worker executes at once, their timeout, their retries and the delay."""
    configure(project, block("基础配置").source)
    project.tasks(PREAMBLE + DEFAULTS)
    project.celery("worker", "-l", "INFO", "-n", "seed@test", ready="seed@test ready.", name="worker-seed")
    limits, fails = (project.app.tasks[name].delay() for name in ("limits", "fails"))

    stats: Any = project.app.control.inspect(destination=["seed@test"], timeout=10).stats()
    pool = stats["seed@test"]["pool"]
    failed = ledger.becomes(fails.id, RunState.RETRYING)

    assert pool["max-concurrency"] == 4
    assert ledger.ends(limits.id).result == [3630, 3600]
    assert failed.max_retries == 3
    assert minutes_from_now(failed.next_attempt_at) == pytest.approx(5, abs=1)


LIMITS = """
import asyncio
from celery import current_task
from llmtasks.dispatch import station

def what_is_in_force():
    return [*current_task.request.timelimit, current_task.max_retries, current_task.default_retry_delay]

probe = task_registry.register(name="probe", config={
    **{name: getattr(task_registry.options("custom_task"), name) for name in ("timeout", "max_retries", "retry_delay")}
})(what_is_in_force)
"""


def test_the_configuration_of_one_task(project: Project, ledger: Ledger) -> None:
    """Its own timeout, retries, delay, priority and limit of instances, in the message, the task and the ledger."""
    module(project, block("任务特定配置"), after=LIMITS)
    project.worker()
    task: Any = project.app.tasks["custom_task"]

    run = ledger.ends(task.delay().id)

    assert (run.state, run.priority, run.max_retries) == (RunState.SUCCEEDED, 1, 5)
    assert (task.soft_time_limit, task.time_limit, task.max_retries, task.default_retry_delay) == (1800, 1830, 5, 600)
    assert task.options.max_instances == 2
    assert ledger.ends(project.app.tasks["probe"].delay().id).result == [1830, 1800, 5, 600]


RETRIED = """
task_registry.register(name="task_with_retry")(task_with_retry)

@task_registry.register(name="third_time")
@retry_with_backoff(max_retries=3, base_delay=0.01)
async def third_time():
    note("tries")
    if len(notes("tries")) < 3:
        raise ConnectionError("not yet")
    return "done"
"""


def test_retrying_inside_a_run(project: Project, ledger: Ledger) -> None:
    """The decorated function runs in a worker; one that fails twice is called three times in one attempt."""
    module(project, block("重试机制"), after=RETRIED)
    project.worker()

    decorated, third = (project.app.tasks[name].delay() for name in ("task_with_retry", "third_time"))

    assert ledger.ends(decorated.id).state is RunState.SUCCEEDED
    run = ledger.ends(third.id)
    assert (run.state, run.result, run.attempts) == (RunState.SUCCEEDED, "done", 1)
    assert len(ledger.notes_now("tries")) == 3


HANDLER = """
async def handle_failure(task, error):
    note("failures", f"{task.name} {task.state} {task.attempt} {type(error).__name__}")
"""


def test_the_callback_of_a_failure(project: Project, ledger: Ledger) -> None:
    """``on_failure`` is called once, after the last attempt, with the run and its error; not after a success."""
    configure(project, 'TASK_CONFIG = {"retry_delay": 0, "max_retries": 1}\n')
    module(project, block("错误回调"), before=HANDLER)
    project.worker()

    good = ledger.ends(project.app.tasks["task_with_callback"].delay().id)
    # Its body cannot fail; a message with an argument that it does not take does.
    bad = ledger.ends(project.app.send_task("task_with_callback", args=("unexpected",)).id)

    assert good.state is RunState.SUCCEEDED
    assert (bad.state, bad.attempts) == (RunState.FAILED, 2)
    assert ledger.notes("failures", 1) == ["task_with_callback failed 2 TypeError"]


MONITORED = """
import dataclasses
import tasks
from llmtasks import Task

task_id = {task_id!r}
status = stats = None

def look():
    return [
        status and dataclasses.asdict(status),
        stats and [stats.total, dict(stats.by_state), stats.success_rate, [worker.name for worker in stats.workers]],
    ]
"""


def test_monitoring(project: Project, ledger: Ledger) -> None:
    """The status of a Task and of a run, and statistics of what ran."""
    project.tasks(PREAMBLE + FUNCTIONS)
    project.worker()
    assert project.app
    task = Task(name="watched", func_name="sync_emails", interval_minutes=30).save_sync()
    run = execute(ledger, task)

    of_task, of_run = (
        run_block(project, block("任务状态监控"), MONITORED.format(task_id=task_id))[-1]
        for task_id in (task.id, run.id)
    )

    status, statistics = of_task
    assert (status["kind"], status["id"], status["name"], status["state"]) == ("task", task.id, "watched", "active")
    assert status["last_run"]["id"] == run.id
    assert status["next_run_at"] is not None
    status, _ = of_run
    assert (status["kind"], status["id"], status["state"], status["attempts"]) == ("run", run.id, "succeeded", 1)
    total, by_state, success_rate, workers = statistics
    assert (total, by_state["succeeded"], success_rate) == (1, 1, 1.0)
    assert workers == ["worker-1@test"]


MEASURED = """
task_registry.register(name="monitored_task")(monitored_task)
"""


def test_measuring(project: Project, ledger: Ledger) -> None:
    """A measured function's run has its time, its CPU time and its peak memory."""
    module(project, block("性能指标"), after=MEASURED)
    project.worker()

    run = ledger.ends(project.app.tasks["monitored_task"].delay().id)

    assert run.state is RunState.SUCCEEDED
    assert run.run_seconds is not None
    assert run.run_seconds >= 0
    assert run.cpu_seconds is not None
    assert (run.peak_memory or 0) > 1_000_000


MAIL = """
import logging
logger = logging.getLogger("mail")

async def get_active_email_accounts():
    note("asked")
    if len(notes("asked")) == 1:
        raise ConnectionError("no such host")
    return ["one@example.com", "two@example.com"]

async def sync_account_emails(account):
    note("synced", account)
"""


def test_synchronising_mail(project: Project, ledger: Ledger) -> None:
    """Every 15 minutes; a failure is logged and the next attempt does the work."""
    configure(project, NO_DELAY)
    module(project, block("邮件同步任务"), before=MAIL)
    worker = project.worker()
    project.beat()
    assert project.app
    task = declared("sync_emails")["sync_emails"]

    run = execute(ledger, task)

    assert (run.state, run.attempts, run.max_retries) == (RunState.SUCCEEDED, 2, 3)
    assert ledger.notes_now("synced") == ["one@example.com", "two@example.com"]
    assert task.interval_minutes == 15
    worker.wait_for_log("邮件同步失败: no such host")


DOCUMENTS = """
import logging
logger = logging.getLogger("documents")

class DocumentNotFound(Exception): ...
class ProcessingError(Exception): ...

async def get_document(doc_id):
    note(f"got-{doc_id}")
    if doc_id == "missing":
        raise DocumentNotFound(doc_id)
    return doc_id

async def process_content(doc):
    if doc == "broken" or (doc == "flaky" and len(notes("got-flaky")) == 1):
        raise ProcessingError(f"cannot read {doc}")

async def update_document_status(doc_id, status):
    note("statuses", f"{doc_id} {status}")
"""


def test_processing_documents(project: Project, ledger: Ledger) -> None:
    """A missing document is no failure; one that cannot be read is tried four times; the others are processed."""
    configure(project, NO_DELAY)
    module(project, block("文档处理任务"), before=DOCUMENTS)
    worker = project.worker()
    task = project.app.tasks["process_document"]
    sent = {doc_id: task.delay(doc_id) for doc_id in ("good", "missing", "flaky", "broken")}

    runs = {doc_id: ledger.ends(result.id) for doc_id, result in sent.items()}

    assert {doc_id: (run.state, run.attempts) for doc_id, run in runs.items()} == {
        "good": (RunState.SUCCEEDED, 1),
        "missing": (RunState.SUCCEEDED, 1),
        "flaky": (RunState.SUCCEEDED, 2),
        "broken": (RunState.FAILED, 4),
    }
    assert sorted(ledger.notes_now("statuses")) == ["flaky processed", "good processed"]
    assert (runs["broken"].error or "").endswith("ProcessingError: cannot read broken")
    assert task.soft_time_limit == 1800
    worker.wait_for_log("文档不存在: missing")
    worker.wait_for_log("处理失败: cannot read broken")


REPORT = """
import logging
logger = logging.getLogger("report")

async def collect_daily_data():
    if is_open("outage"):
        raise ConnectionError("no data")
    return {"runs": 7}

async def generate_report(data):
    return f"report of {data['runs']} runs"

async def send_report_email(report):
    note("mails", report)

async def notify_admin(subject, text):
    note("admin", f"{subject}: {text}")
"""


def test_generating_reports(project: Project, ledger: Ledger) -> None:
    """Every midnight of the machine's zone; a failure tells the administrator and ends the run as failed."""
    configure(project, 'TASK_CONFIG = {"max_retries": 0}\n')
    project.environ["TZ"] = "Asia/Shanghai"
    module(project, block("定时报告生成"), before=REPORT)
    project.worker()
    project.beat()
    assert project.app
    task = declared("generate_report")["generate_report"]

    sent = execute(ledger, task)
    ledger.open_gate("outage")
    failed = execute(ledger, task)

    assert (task.schedule, task.timezone) == ("0 0 * * *", "Asia/Shanghai")
    assert task.next_run_at == Cron("0 0 * * *", "Asia/Shanghai").next_after(task.created_at or datetime.now(UTC))
    assert sent.state is RunState.SUCCEEDED
    assert ledger.notes_now("mails") == ["report of 7 runs"]
    assert (failed.state, failed.error) == (RunState.FAILED, "ConnectionError: no data")
    assert ledger.notes_now("admin") == ["报告生成失败: no data"]
