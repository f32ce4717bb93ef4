"""``backfill``: runs for instants that went by without one."""

from __future__ import annotations

from datetime import datetime

import click

from llmtasks import backfill as backfills
from llmtasks.cli import documents, tables
from llmtasks.cli.target import read_since, station_of, task_like
from llmtasks.errors import TaskNotFoundError
from llmtasks.store import schedules


@click.command()
@click.argument("target", metavar="ID|NAME")
@click.option(
    "--from",
    "start",
    callback=read_since,
    required=True,
    metavar="WHEN",
    help="The first instant: 2h (ago), 2026-01-31, 2026-01-31T08:00+01:00.",
)
@click.option("--to", "end", callback=read_since, metavar="WHEN", help="The last instant; by default now.")
@click.option("--limit", type=click.IntRange(1, backfills.MOST_INSTANTS), help="At most so many runs (1,000).")
@click.option("--dry-run", is_flag=True, help="Only say which instants would get a run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def backfill(
    context: click.Context,
    target: str,
    start: datetime,
    end: datetime | None,
    limit: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run a Task for each of its instants in a time that has passed, both ends included, that has no run.

    Instants that a policy skipped get their run; those that ran, whatever came of it, get no other.
    """
    at = station_of(context)
    task = task_like(target)
    with at.database.reading() as connection:
        row = schedules.get(connection, task.id or "")
    if row is None:
        raise TaskNotFoundError(f"no Task has the id {task.id!r} any more")
    new = backfills.missing(at, row, start, end or at.database.now(), limit)
    named = [item.scheduled_for for item in new if item.scheduled_for is not None]
    if dry_run:
        if as_json:
            tables.print_json({"id": row.id, "name": row.name, "dry_run": True, "count": len(new), "instants": named})
            return
        for instant in named:
            click.echo(tables.local_exact(instant))
        click.echo(f"{len(new)} runs of {row.name} would be opened")
        return
    opened = backfills.open_all(at, new)
    if as_json:
        found = [documents.run_document(run) for run in opened]
        tables.print_json({"id": row.id, "name": row.name, "dry_run": False, "count": len(opened), "runs": found})
        return
    click.echo(f"{len(opened)} runs of {row.name} are opened")
