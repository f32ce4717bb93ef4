"""``schedules``, ``runs`` and ``next``: what there is."""

from __future__ import annotations

from datetime import datetime

import click

from llmtasks.cli import documents, tables
from llmtasks.cli.target import read_since, station_of, task_like
from llmtasks.states import RunState, ScheduleState
from llmtasks.store import runs as store_runs
from llmtasks.task import Task


@click.command()
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([str(state) for state in ScheduleState]),
    help="Only these states.",
)
@click.option("--func", "func_name", metavar="NAME", help="Only this task function.")
@click.option("--limit", type=click.IntRange(1), help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def schedules(
    context: click.Context, states: tuple[str, ...], func_name: str | None, limit: int | None, as_json: bool
) -> None:
    """List the stored Tasks, those declared in code included."""
    station_of(context)
    found = Task.list_sync(func_name=func_name, states=states, limit=limit)
    if as_json:
        tables.print_json([documents.task_document(task) for task in found])
        return
    empty = "no such schedule" if states or func_name else "no schedule yet; those in code are stored when beat starts"
    rows = [documents.task_row(task) for task in found]
    tables.print_table(documents.TASK_COLUMNS, rows, empty=empty)


@click.command()
@click.option(
    "--state", "states", multiple=True, type=click.Choice([str(state) for state in RunState]), help="Only these states."
)
@click.option("--func", "func_name", metavar="NAME", help="Only this task function.")
@click.option("--schedule", "schedule", metavar="ID|NAME", help="Only runs of this Task.")
@click.option(
    "--since",
    callback=read_since,
    metavar="WHEN",
    help="Only those created since: 2h, 2026-01-31, 2026-01-31T08:00+01:00.",
)
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def runs(
    context: click.Context,
    states: tuple[str, ...],
    func_name: str | None,
    schedule: str | None,
    since: datetime | None,
    limit: int,
    as_json: bool,
) -> None:
    """List the latest runs, newest first."""
    at = station_of(context)
    schedule_id = task_like(schedule).id if schedule is not None else None
    with at.database.reading() as connection:
        found = store_runs.find(
            connection,
            at.name,
            states=map(RunState, states),
            func_name=func_name,
            schedule_id=schedule_id,
            since=since,
            limit=limit,
        )
    if as_json:
        tables.print_json([documents.run_document(run) for run in found])
        return
    documents.print_runs(found, "no such run")


@click.command("next")
@click.argument("target", metavar="ID|NAME")
@click.option("-n", "--count", type=click.IntRange(1, 10_000), default=5, show_default=True, help="How many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def next_runs(context: click.Context, target: str, count: int, as_json: bool) -> None:
    """Say when a Task runs next; of a paused one, when it would if it were resumed now."""
    station_of(context)
    task = task_like(target)
    found = task.next_runs(count)
    if as_json:
        tables.print_json({"id": task.id, "name": task.name, "state": task.state, "next_runs": found})
        return
    if task.state is not ScheduleState.ACTIVE:
        click.echo(f"{task.name} is {task.state}: it would run", err=True)
    for instant in found:
        click.echo(tables.local_exact(instant))
    if not found:
        click.echo(f"{task.name} runs no more")
