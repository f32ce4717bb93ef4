"""``purge`` and ``migrate``: the ledger's size and its tables."""

from __future__ import annotations

import sys
from datetime import timedelta
from importlib import resources
from typing import Final

import click

from llmtasks.cli import tables
from llmtasks.cli.target import read_span, station_of
from llmtasks.store import purging

_NO_TABLES: Final = "base"


@click.command()
@click.option(
    "--older-than",
    callback=read_span,
    metavar="AGE",
    help="Ended longer ago: 12h, 30d, 8w.  [default: LLMTASKS_KEEP_RUNS_DAYS]",
)
@click.option("--func", "func_name", metavar="NAME", help="Only this task function.")
@click.option("--dry-run", is_flag=True, help="Only say how many there are.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def purge(
    context: click.Context, older_than: timedelta | None, func_name: str | None, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Delete finished runs from the ledger; live ones and those whose end is still to be told stay."""
    at = station_of(context)
    if older_than is None:
        older_than = timedelta(days=at.settings.keep_runs_days)
    before = at.database.now() - older_than
    with at.database.reading() as connection:
        count = purging.purgeable(connection, at.name, before, func_name)
    what = f"{count} run{'' if count == 1 else 's'} that ended before {tables.local_exact(before)}"
    deleted = 0
    if count and not dry_run:
        _agree(f"Delete {what}?", yes)
        for found in purging.purge(at.database, at.name, before, func_name):
            deleted += found
            if sys.stderr.isatty():
                click.echo(f"\rdeleted {deleted} of {count}", err=True, nl=found < purging.SLICE)
    if as_json:
        tables.print_json({"before": before, "func_name": func_name, "found": count, "deleted": deleted})
    elif dry_run or not count:
        click.echo(f"{what}: {'nothing is deleted' if dry_run else 'nothing to delete'}")
    else:
        click.echo(f"deleted {deleted} run{'' if deleted == 1 else 's'}")


@click.command()
@click.option("--to", "target", default="head", show_default="the newest", help='A schema version; "base" drops all.')
@click.option("--yes", is_flag=True, help="Do not ask, where data would be lost.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def migrate(context: click.Context, target: str, yes: bool, as_json: bool) -> None:
    """Bring the database's tables to the version that this llmtasks needs."""
    database = station_of(context).database
    known = _versions()
    if target not in {"head", _NO_TABLES, *known}:
        raise click.BadParameter(f"{target!r}: expected head, base or one of {', '.join(known)}", param_hint="--to")
    before = database.version()
    if before is not None and (target == _NO_TABLES or (target != "head" and target < before)):
        _agree(
            f"Going back from schema version {before} to {target} deletes what the older tables cannot hold. Go on?",
            yes,
        )
    database.migrate(target)
    after = database.version()
    where = database.url.render_as_string()
    if as_json:
        tables.print_json({"database": where, "from": before, "to": after})
    elif before == after:
        click.echo(f"{where}: already at schema version {after or 'none'}")
    else:
        click.echo(f"{where}: schema version {before or 'none'} -> {after or 'none'}")


def _versions() -> list[str]:
    """The schema versions that this llmtasks knows, read off the migrations' file names: v0001_first_tables.py."""
    folder = resources.files("llmtasks.store") / "migrations" / "versions"
    names = sorted(item.name for item in folder.iterdir())
    return [name[1:].partition("_")[0] for name in names if name.startswith("v") and name.endswith(".py")]


def _agree(question: str, yes: bool) -> None:
    """Ask a person; a script has to say --yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody can be asked here: repeat it with --yes")
    click.confirm(question, abort=True, err=True)
