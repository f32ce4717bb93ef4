"""``pause`` and ``resume``: a Task, or a function or a queue in the whole cluster."""

from __future__ import annotations

import click

from llmtasks.cli import tables
from llmtasks.cli.control import say
from llmtasks.cli.target import station_of, task_like, user
from llmtasks.task import Task


def _one_of(target: str | None, function: str | None, queue: str | None) -> None:
    """Raise unless one thing is named."""
    if sum(item is not None for item in (target, function, queue)) != 1:
        raise click.UsageError("expected one of ID|NAME of a Task, --function NAME and --queue NAME")


@click.command()
@click.argument("target", metavar="[ID|NAME]", required=False)
@click.option("--function", metavar="NAME", help="Start no attempt of this task function, on no worker.")
@click.option("--queue", metavar="NAME", help="Let no worker consume this queue.")
@click.option("--by", metavar="NAME", help="Who wants it.  [default: the user of this shell]")
@click.option("--reason", metavar="TEXT", help="Why; with --function and --queue.")
@click.option("--list", "listing", is_flag=True, help="Only show which functions and queues are paused.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def pause(
    context: click.Context,
    target: str | None,
    function: str | None,
    queue: str | None,
    by: str | None,
    reason: str | None,
    listing: bool,
    as_json: bool,
) -> None:
    """Let a Task fire no more until it is resumed; its runs go on. `why` says who paused it.

    With --function or --queue nothing of it starts anywhere, within a second: runs wait in the ledger, messages in the
    broker.
    """
    if listing:
        station_of(context)
        found = Task.pauses_sync()
        if as_json:
            tables.print_json(found)
        else:
            click.echo("\n".join(map(str, found)) or "no function and no queue is paused")
        return
    _one_of(target, function, queue)
    if target is not None and reason is not None:
        raise click.UsageError("--reason is for --function and --queue")
    station_of(context, functions=function is not None)
    if target is not None:
        say(task_like(target).pause_sync(by or user()), as_json=as_json)
        return
    if function is not None:
        paused = Task.pause_function_sync(function, by=by or user(), reason=reason)
    else:
        paused = Task.pause_queue_sync(str(queue), by=by or user(), reason=reason)
    if as_json:
        tables.print_json(paused)
    else:
        click.echo(str(paused))


@click.command()
@click.argument("target", metavar="[ID|NAME]", required=False)
@click.option("--function", metavar="NAME", help="Let the runs of this task function start again.")
@click.option("--queue", metavar="NAME", help="Let its workers consume this queue again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def resume(context: click.Context, target: str | None, function: str | None, queue: str | None, as_json: bool) -> None:
    """Let a paused Task fire again, from its next instant on; or go on with a paused function or queue."""
    _one_of(target, function, queue)
    station_of(context)
    if target is not None:
        say(task_like(target).resume_sync(), as_json=as_json)
        return
    kind, name = ("function", function) if function is not None else ("queue", str(queue))
    ended = Task.resume_function_sync(str(name)) if function is not None else Task.resume_queue_sync(str(name))
    if as_json:
        tables.print_json({"kind": kind, "name": name, "was_paused": ended is not None})
    else:
        click.echo(f"{kind} {name!r} goes on" if ended is not None else f"{kind} {name!r} was not paused")
