"""The report: what the index holds and what the tasks did, as tables in Markdown and HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from examples.ragapp.index import Index
from llmtasks.monitor import TaskStatistics
from llmtasks.states import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One part of a report."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A report, before it is written down in some format."""

    title: str
    tables: Sequence[Table]

    @property
    def markdown(self) -> str:
        """The report as Markdown."""
        parts = [f"# {self.title}"]
        for table in self.tables:
            rows = [table.columns, ["---"] * len(table.columns), *table.rows] if table.rows else []
            lines = ["| " + " | ".join(_text(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
            parts += [f"## {table.heading}", "\n".join(lines) or "Nothing."]
        return "\n\n".join(parts) + "\n"

    @property
    def html(self) -> str:
        """The report as an HTML page."""
        parts = [f"<title>{html.escape(self.title)}</title><h1>{html.escape(self.title)}</h1>"]
        for table in self.tables:
            head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(_text(cell))}</td>" for cell in row) + "</tr>" for row in table.rows
            )
            parts.append(f"<h2>{html.escape(table.heading)}</h2><table><tr>{head}</tr>{body}</table>")
        return "<!doctype html><meta charset=utf-8>" + "\n".join(parts)


def index_tables(index: Index) -> list[Table]:
    """What the index holds."""
    chunks, mails = index.totals()
    held = [*index.counts().items(), ("searchable chunks", chunks), ("mails read", mails)]
    recent = [(document.title, document.status, document.updated) for document in index.recent(limit=5)]
    return [
        Table(heading="Documents", columns=("status", "count"), rows=held),
        Table(heading="Documents that changed last", columns=("title", "status", "when"), rows=recent),
    ]


def ledger_tables(statistics: TaskStatistics) -> list[Table]:
    """What the tasks did, as the ledger tells it."""
    summary = [
        ("runs that succeeded, of those that ended", _percent(statistics.success_rate)),
        ("runs per minute", statistics.throughput),
        ("seconds of a run, median", statistics.run_time.p50),
        ("seconds of a run, 99 of 100 below", statistics.run_time.p99),
        ("attempts after the first", statistics.retries),
        ("schedules that are late", statistics.overdue),
        *((f"CPU of {worker.name}", f"{worker.cpu_percent or 0:.0f} %") for worker in statistics.workers),
    ]
    functions = [
        (
            function.func_name,
            function.total,
            function.by_state[RunState.FAILED],
            function.retries,
            _percent(function.success_rate),
            function.run_seconds,
        )
        for function in statistics.functions
    ]
    return [
        Table(heading="Tasks in the last 24 hours", columns=("what", "value"), rows=summary),
        Table(
            heading="Tasks by function",
            columns=("function", "runs", "failed", "retries", "succeeded", "seconds, mean"),
            rows=functions,
        ),
    ]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def _text(value: object) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.3g}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S} UTC"
        case _:
            return " ".join(str(value).split())
