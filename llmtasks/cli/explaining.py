"""``why``: what keeps a Task or a run from running, or when it will run."""

from __future__ import annotations

from datetime import datetime

import click

from llmtasks.cli import tables
from llmtasks.cli.target import may_be_run, station_of, task_named, unknown
from llmtasks.errors import RunNotFoundError
from llmtasks.why import Fact, explain


@click.command()
@click.argument("target", metavar="ID|NAME")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def why(context: click.Context, target: str, as_json: bool) -> None:
    """Say why a Task or a run is not running, or when it will: the answer first, then the facts."""
    at = station_of(context, functions=True)
    task = task_named(target)
    try:
        found = explain(at, target if task is None or task.id is None else task.id)
    except RunNotFoundError:
        if may_be_run(target):
            raise
        raise unknown(target) from None
    if as_json:
        tables.print_json(found)
        return
    click.echo(found.answer)
    if found.facts:
        click.echo()
        tables.print_block([(fact.name, _text(fact)) for fact in found.facts])


def _text(fact: Fact) -> str:
    return tables.local_exact(fact.value) if isinstance(fact.value, datetime) else fact.value
