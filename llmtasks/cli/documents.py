"""Tasks and runs as the command line shows them: rows and blocks for people, documents for machines."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from llmtasks.changes import OPTION_NAMES
from llmtasks.cli import tables
from llmtasks.cli.tables import Column
from llmtasks.policies import Overlap
from llmtasks.store.runs import Run
from llmtasks.task import Task

#: What a Task's document has, in this order.
_TASK_FIELDS: Final = (
    "id", "name", "func_name", "state", "reason", "paused_at", "next_run_at", "last_run_at", "scheduled_at",
    "interval_minutes", "schedule", "timezone", "starts_at", "ends_at", "params", *OPTION_NAMES, "fired", "created_at",
    "updated_at",
)  # fmt: skip
TASK_COLUMNS: Final = (
    Column(title="ID"),
    Column(title="NAME", may_shrink=True),
    Column(title="STATE"),
    Column(title="TRIGGER", may_shrink=True),
    Column(title="NEXT RUN"),
    Column(title="LAST RUN"),
    Column(title="REASON", may_shrink=True),
)
RUN_COLUMNS: Final = (
    Column(title="ID"),
    Column(title="NAME", may_shrink=True),
    Column(title="STATE"),
    Column(title="CREATED"),
    Column(title="WAIT", right=True),
    Column(title="TIME", right=True),
    Column(title="ATTEMPT", right=True),
    Column(title="REASON", may_shrink=True),
)


def task_document(task: Task) -> dict[str, Any]:
    """A Task for machines."""
    found = {name: getattr(task, name) for name in _TASK_FIELDS}
    if task.schedule is None:
        found["timezone"] = None
    return found


def run_document(run: Run) -> dict[str, Any]:
    """A run for machines."""
    found: dict[str, Any] = {name: getattr(run, name) for name in Run.__dataclass_fields__}
    return {**found, "wait_seconds": run.wait_seconds}


def task_row(task: Task) -> list[str]:
    """A Task as a row under ``TASK_COLUMNS``."""
    return [
        task.id or "",
        task.name or "",
        str(task.state),
        trigger_of(task),
        tables.local(task.next_run_at),
        tables.local(task.last_run_at),
        task.reason or "",
    ]


def run_row(run: Run) -> list[str]:
    """A run as a row under ``RUN_COLUMNS``."""
    return [
        run.id,
        run.name,
        str(run.state),
        tables.local(run.created_at),
        # What .delay() sent is recorded by its first start: how long it waited nobody knows.
        tables.duration(run.wait_seconds or None),
        tables.duration(run.run_seconds),
        str(run.attempt) if run.started_at else "-",
        run.reason or run.error or "",
    ]


def print_runs(found: Sequence[Run], empty: str) -> None:
    """Print runs for people."""
    tables.print_table(RUN_COLUMNS, [run_row(run) for run in found], empty=empty)


def trigger_of(task: Task) -> str:
    """When a Task runs, in words."""
    if task.schedule is not None:
        rule = f"{task.schedule} ({task.timezone})"
    elif task.interval_minutes is not None:
        rule = tables.every(round(task.interval_minutes * 60_000_000))
    else:
        rule = f"once at {tables.local(task.scheduled_at)}"
    return rule + _limits(task)


def _limits(task: Task) -> str:
    """What keeps a Task from running at all of its trigger's instants, in words."""
    now = datetime.now(UTC)
    parts = (
        f"from {tables.local(task.starts_at)}" if task.starts_at and task.starts_at > now else "",
        f"until {tables.local(task.ends_at)}" if task.ends_at else "",
        f"{task.fired} of {task.max_runs} runs" if task.max_runs else "",
        f"up to {tables.duration(task.jitter_seconds)} later" if task.jitter_seconds else "",
        f"overlap {task.overlap}" if task.overlap not in {None, Overlap.SKIP} else "",
    )
    return "".join(f", {part}" for part in parts if part)


def task_block(task: Task) -> list[tuple[str, str]]:
    """A Task as names and values."""
    given = {name: getattr(task, name) for name in OPTION_NAMES if getattr(task, name) is not None}
    lines = [
        ("task", task.id or ""),
        ("name", task.name or ""),
        ("function", task.func_name),
        ("state", str(task.state)),
        ("reason", task.reason or ""),
        ("paused", tables.local_exact(task.paused_at) if task.paused_at else ""),
        ("trigger", trigger_of(task)),
        ("next run", tables.local_exact(task.next_run_at)),
        ("last run", tables.local_exact(task.last_run_at)),
        ("starts", tables.local_exact(task.starts_at) if task.starts_at else ""),
        ("ends", tables.local_exact(task.ends_at) if task.ends_at else ""),
        ("runs", f"{task.fired} of at most {task.max_runs}" if task.max_runs else ""),
        ("params", tables.pretty(task.params)),
        ("options", tables.pretty(given) if given else ""),
        ("created", tables.local_exact(task.created_at)),
        ("changed", tables.local_exact(task.updated_at)),
    ]
    return [(name, value) for name, value in lines if value]


def run_block(run: Run) -> list[tuple[str, str]]:
    """A run as names and values."""
    lines = [
        ("run", run.id),
        ("name", run.name),
        ("function", run.func_name),
        ("state", str(run.state)),
        ("reason", run.reason or ""),
        ("task", run.schedule_id or ""),
        ("scheduled for", tables.local_exact(run.scheduled_for) if run.scheduled_for else ""),
        ("stands for", f"{run.stands_for} instants" if run.stands_for > 1 else ""),
        ("backfilled", "yes" if run.backfilled else ""),
        ("queue", run.queue or ""),
        ("priority", f"{run.priority} (1 is first, 10 last)"),
        ("attempts", _attempts(run)),
        ("next attempt", tables.local_exact(run.next_attempt_at) if run.state == "retrying" else ""),
        ("created", tables.local_exact(run.created_at)),
        ("started", tables.local_exact(run.started_at)),
        ("ended", tables.local_exact(run.ended_at)),
        ("waited", tables.duration(run.wait_seconds) if run.wait_seconds else ""),
        ("took", tables.duration(run.run_seconds) if run.run_seconds is not None else ""),
        ("CPU", tables.duration(run.cpu_seconds) if run.cpu_seconds is not None else ""),
        ("peak memory", tables.memory(run.peak_memory) if run.peak_memory is not None else ""),
        ("worker", run.worker or ""),
        ("cancel asked", tables.local_exact(run.cancel_requested_at) if run.cancel_requested_at else ""),
        ("args", tables.pretty(run.args) if run.args else ""),
        ("params", tables.pretty(run.kwargs) if run.kwargs else ""),
        ("result", tables.pretty(run.result) if run.state == "succeeded" else ""),
        ("error", run.error or ""),
        ("traceback", run.traceback or ""),
    ]
    return [(name, value) for name, value in lines if value]


def _attempts(run: Run) -> str:
    allowed = f" of at most {run.max_retries + 1}" if run.max_retries is not None else ""
    lost = f", {run.losses} lost with their worker" if run.losses else ""
    return f"{run.attempts} ended{allowed}{lost}"
