"""The public API as type checkers see it: checked by mypy and pyright, both strict, never run.

An expected error is marked for both; one that is not reported fails the check (mypy's warn_unused_ignores, pyright's
reportUnnecessaryTypeIgnoreComment).
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: F401  # in quotes below
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, assert_type

import llmtasks
from llmtasks import Run, Task, retry_with_backoff, task_registry
from llmtasks.states import RunState
from llmtasks.store.pauses import Pause

if TYPE_CHECKING:
    from llmtasks.result import RunResult  # noqa: F401  # in quotes below


# -- every spelling of the decorator keeps the function's signature


@task_registry.register
async def bare(doc_id: str, pages: int = 1) -> int:
    return pages


@task_registry.register(name="keywords", max_retries=3, timeout=1800, priority=1, misfire="skip", throws=(KeyError,))
async def keywords(doc_id: str, *, pages: int = 1) -> list[str]:
    return [doc_id] * pages


@task_registry.register(name="config", config={"timeout": 1800, "max_retries": 5})
def configured(x: int, y: int) -> float:
    return x / y


@task_registry.register(name="plain", ledger="off", max_concurrency=20, ignore_result=True)
async def plain(doc_id: str) -> int:
    return len(doc_id)


task_registry.register(name="ledger", ledger="never")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


async def pausing() -> None:
    assert_type(await Task.pause_function("plain", by="ops", reason="why"), Pause)
    assert_type(Task.pause_queue_sync("mail"), Pause)
    assert_type(await Task.resume_function("plain"), "Pause | None")
    assert_type(await Task.pauses(), "list[Pause]")
    Task.resume_queue_sync(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@task_registry.register(name="bound", bind=True)
async def bound(self: Any, doc_id: str) -> bytes:
    return doc_id.encode()


@task_registry.register(name="bound_sync", bind=True, schedule="0 0 * * *", timezone="Europe/Berlin")
def bound_sync(self: Any) -> None:
    return None


@task_registry.register(
    name="policies",
    interval_minutes=5,
    overlap="queue_one",
    misfire="all",
    misfire_window=timedelta(hours=1),
    starts_at=datetime(2026, 1, 1),
    ends_at=datetime(2027, 1, 1),
    max_runs=10,
    jitter_seconds=2.5,
)
async def policies() -> None: ...


task_registry.register(name="wrong", overlap="queue")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@task_registry.register(
    name="unique",
    unique=("doc_id", "language"),
    unique_for=timedelta(hours=1),
    unique_states=("pending", "queued"),
    on_duplicate="refuse",
)
async def unique(doc_id: str, language: str) -> int:
    return len(doc_id + language)


task_registry.register(name="unique_all", unique=True, on_duplicate="replace")
task_registry.register(name="unique_one", unique="doc_id", unique_for=60)
task_registry.register(name="wrong", unique=True, on_duplicate="drop")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
task_registry.register(name="wrong", unique=True, unique_states=("failed",))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def handle_failure(run: Run, error: Exception) -> None:
    print(run.id, run.attempt, error)


@task_registry.register(name="callbacks", on_failure=handle_failure, on_success=lambda run, result: run.id)
async def callbacks() -> None: ...


async def sent() -> None:
    assert_type(bare.delay("1"), "RunResult[int]")
    assert_type(await bare.adelay("1", pages=2), "RunResult[int]")
    assert_type(bare.map_delay(["1", "2"]), "Sequence[RunResult[int]]")
    assert_type(bare.map_delay(["1", "2"], priority=1), "Sequence[RunResult[int]]")
    assert_type(bare.apply_async(("1",), countdown=5, priority=1), "RunResult[int]")
    assert_type(keywords.delay("1", pages=2), "RunResult[list[str]]")
    assert_type(configured.delay(1, y=2), "RunResult[float]")
    assert_type(bound.delay("1"), "RunResult[bytes]")
    assert_type(bound_sync.delay(), "RunResult[None]")
    assert_type(unique.delay("1", language="en"), "RunResult[int]")
    assert_type(bare.name, str)
    (bare.s("1") | keywords.si("1")).apply_async()


async def called_inline() -> None:
    assert_type(await bare("1"), int)
    assert_type(await keywords("1", pages=2), list[str])
    assert_type(configured(1, 2), float)
    assert_type(await bound("1"), bytes)


# -- wrong arguments are errors


async def wrong_arguments() -> None:
    bare.delay()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    bare.delay(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bare.delay("1", page=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    bare.delay("1", 2, 3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await bare.adelay(doc=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await bare(2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    keywords.delay("1", 2)  # type: ignore[call-arg, misc, unused-ignore]  # pyright: ignore[reportCallIssue]
    configured.delay("1", 2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bound.delay()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    bound_sync.delay("1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def wrong_options() -> None:
    task_registry.register(max_retires=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    task_registry.register(priority="high")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    task_registry.register(misfire="never")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    task_registry.register(acks_late=False)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


# -- Task


async def tasks() -> None:
    task = Task(name="one", func_name="bare", params={"doc_id": "123"}, scheduled_at=datetime.now())
    assert_type(await task.save(), Task)
    assert_type(task.save_sync(), Task)
    assert_type(await task.pause(), Task)
    assert_type(await task.resume(), Task)
    assert_type(await task.cancel(), Task)
    assert_type(await task.execute_now(), Run)
    assert_type(task.execute_now_sync(), Run)
    assert_type(await task.backfill(datetime.now(), datetime.now()), list[Run])
    assert_type(task.backfill_sync(datetime.now(), datetime.now(), limit=5), list[Run])
    assert_type(await Task.get("one"), Task)
    assert_type(await Task.list(states=["active"]), list[Task])
    assert_type(Task.list_sync(name="one"), list[Task])
    assert_type(task.next_runs(3), list[datetime])
    assert_type(await Task.cancel_run("id"), Run | None)
    assert_type(task.next_run_at, datetime | None)

    Task(name="no function")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Task("bare")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Task(func_name="bare", interval_minutes="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Task(func_name="bare", state="active")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def runs_are_values(run: Run) -> None:
    run.state = RunState.FAILED  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


# -- what wraps a function keeps its signature too


@retry_with_backoff(max_retries=3)
async def with_retry(x: int) -> str:
    return str(x)


@retry_with_backoff(max_retries=3, retry_on=(ConnectionError,))
def with_retry_sync(x: int) -> str:
    return str(x)


@llmtasks.track_task_performance
async def tracked(x: int) -> str:
    return str(x)


@task_registry.register(name="stacked")
@llmtasks.track_task_performance
@retry_with_backoff(max_retries=3)
async def stacked(x: int) -> str:
    return str(x)


@llmtasks.on_worker_loop_start
async def opens() -> int:
    return 1


@llmtasks.on_worker_loop_stop  # type: ignore[type-var]  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
async def closes(what: str) -> None: ...


async def wrapped() -> None:
    assert_type(await opens(), int)
    assert_type(await with_retry(1), str)
    assert_type(with_retry_sync(1), str)
    assert_type(await tracked(1), str)
    assert_type(stacked.delay(1), "RunResult[str]")
    await with_retry("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    stacked.delay("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
