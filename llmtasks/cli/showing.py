"""``show``: everything about one Task or one run."""

from __future__ import annotations

from typing import Final

import click

from llmtasks.cli import documents, tables
from llmtasks.cli.target import may_be_run, station_of, task_named, unknown
from llmtasks.dispatch import Station
from llmtasks.errors import RunNotFoundError
from llmtasks.monitor import TaskMonitor
from llmtasks.store import runs
from llmtasks.store.runs import Run
from llmtasks.task import Task

#: The latest runs that are shown with a Task.
LATEST: Final = 5


@click.command()
@click.argument("target", metavar="ID|NAME")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def show(context: click.Context, target: str, as_json: bool) -> None:
    """Show a Task with its latest runs, or a run with arguments, result and traceback."""
    at = station_of(context)
    task = task_named(target)
    if task is not None:
        _show_task(at, task, as_json=as_json)
        return
    with at.database.reading() as connection:
        run = runs.get(connection, target)
    if run is not None:
        _show_run(run, as_json=as_json)
        return
    _show_unknown(target, as_json=as_json)


def _show_task(at: Station, task: Task, *, as_json: bool) -> None:
    assert task.id is not None  # it is stored
    with at.database.reading() as connection:
        found = runs.find(connection, at.name, schedule_id=task.id, limit=LATEST)
    if as_json:
        document = documents.task_document(task)
        tables.print_json({"kind": "task", **document, "runs": [documents.run_document(run) for run in found]})
        return
    tables.print_block(documents.task_block(task))
    click.echo()
    documents.print_runs(found, "no run yet")


def _show_run(run: Run, *, as_json: bool) -> None:
    if as_json:
        tables.print_json({"kind": "run", **documents.run_document(run)})
    else:
        tables.print_block(documents.run_block(run))


def _show_unknown(target: str, *, as_json: bool) -> None:
    """Show what Celery says of a run that is not in the ledger.

    Raises:
        NotFoundError: It says nothing.
    """
    if not may_be_run(target):
        raise unknown(target)
    status = TaskMonitor.get_task_status_sync(target)
    if status.celery_state == "PENDING":
        raise RunNotFoundError(
            f"no Task or run has the id {target!r}; a run of .delay() is in the ledger from its first start on"
        )
    if as_json:
        tables.print_json({"kind": "run", "id": target, "state": status.state, "reason": status.reason})
    else:
        tables.print_block([("run", target), ("state", str(status.state)), ("reason", status.reason or "")])
