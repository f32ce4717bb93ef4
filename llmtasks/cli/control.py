"""``run`` and ``cancel``: what an operator does to Tasks and runs."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, Final, cast

import click

from llmtasks import sender
from llmtasks.cli import documents, tables
from llmtasks.cli.target import may_be_run, station_of, task_named
from llmtasks.dispatch import Station, cancel_run, dispatch, find_run
from llmtasks.errors import ForbiddenTransitionError, NotFoundError, nearest
from llmtasks.plan import check_params
from llmtasks.registry import task_registry
from llmtasks.states import RunState
from llmtasks.store import runs
from llmtasks.store.runs import NewRun, Run
from llmtasks.task import Task

#: Seconds between two looks at a run that is waited for.
LOOK_EVERY: Final = 0.2
_BY: Final = "cancelled from the command line"


def read_params(_context: click.Context, _parameter: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """Read keyword arguments: a JSON object."""
    if value is None:
        return None
    try:
        found: Any = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.BadParameter(f"{value!r}: expected a JSON object of the function's parameters by name")
    return cast("dict[str, Any]", found)


@click.command()
@click.argument("target", metavar="ID|NAME|FUNCTION")
@click.option("--params", callback=read_params, metavar="JSON", help="The function's parameters as a JSON object.")
@click.option("--wait", is_flag=True, help="Wait for the end and print the result; exit code 1 unless it succeeded.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def run(context: click.Context, target: str, params: dict[str, Any] | None, wait: bool, as_json: bool) -> None:
    """Run a Task now, by its id or name, or a task function; with --params always the function."""
    at = station_of(context, functions=True)
    task = task_named(target) if params is None else None
    if task is not None:
        started = task.execute_now_sync()
    elif target in task_registry:
        started = _run_function(at, target, params or {})
    elif params is not None and task_named(target) is not None:
        raise NotFoundError(f"{target!r} is a Task, which has its own params, and no task function: leave --params out")
    else:
        names = {*task_registry.names(), *(str(item.name) for item in Task.list_sync())}
        near = " or ".join(repr(name) for name in nearest(target, names))
        hint = (
            f"did you mean {near}?"
            if near
            else (
                "`llmtasks schedules` lists the Tasks; functions are known from the modules of -A or LLMTASKS_IMPORTS"
            )
        )
        raise NotFoundError(f"no Task has the id or name {target!r} and no task function is registered as that; {hint}")
    if not wait:
        if as_json:
            tables.print_json(documents.run_document(started))
        else:
            click.echo(f"run {started.id} of {started.name} is {started.state}")
        return
    ended = _wait_for(at, started, quiet=as_json)
    if as_json:
        tables.print_json(documents.run_document(ended))
    elif ended.state is RunState.SUCCEEDED:
        click.echo(tables.pretty(ended.result))
    else:
        click.echo(ended.traceback or ended.reason or ended.error or "", err=True)
    if ended.state is not RunState.SUCCEEDED:
        context.exit(1)


@click.command()
@click.argument("target", metavar="ID|NAME")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def cancel(context: click.Context, target: str, as_json: bool) -> None:
    """End a Task and its unfinished runs for good, or one run.

    An id that no run has yet is remembered: its run does not start when it comes.
    """
    at = station_of(context)
    task = task_named(target)
    if task is not None:
        say(task.cancel_sync(_BY), as_json=as_json)
        return
    with at.database.reading() as connection:
        before = runs.get(connection, target)
    if before is None and not may_be_run(target):
        raise NotFoundError(f"no Task has the id or name {target!r}, and no run the id")
    if before is not None and before.state.is_final:
        raise ForbiddenTransitionError(f"run {target} has ended already: it is {before.state}")
    after = cancel_run(at, target, _BY)
    if as_json:
        found: Any = {"id": target, "state": "cancelled"} if after is None else documents.run_document(after)
        tables.print_json({"kind": "run", **found})
    elif after is None:
        click.echo(f"run {target} is not known yet: when it comes it does not start")
    elif after.state is RunState.CANCELLED:
        click.echo(f"run {target} is cancelled")
    else:
        click.echo(f"run {target} is {after.state}: its worker was asked to cancel it")


def say(task: Task, *, as_json: bool) -> None:
    """Print what a Task is now."""
    if as_json:
        tables.print_json({"kind": "task", **documents.task_document(task)})
        return
    following = f", its next run is at {tables.local_exact(task.next_run_at)}" if task.next_run_at else ""
    click.echo(f"{task.name} is {task.state}{following}")


def _run_function(at: Station, func_name: str, params: dict[str, Any]) -> Run:
    """Dispatch a run of a task function: recorded before it is sent, as a Task's."""
    check_params(func_name, params)
    options, registered = task_registry.options(func_name), at.app.tasks[func_name]
    envelope = {"expires": sender.absolute(registered.expires), "ignore_result": registered.ignore_result}
    return dispatch(
        at,
        NewRun(
            id=str(uuid.uuid4()),
            app=at.name,
            func_name=func_name,
            name=func_name,
            args="[]",
            kwargs=sender.dumps(params, "params"),
            envelope=sender.envelope_of_options(envelope),
            queue=options.queue,
            priority=options.priority,
            unique=task_registry.unique(at.name, func_name, [], params),
        ),
    )


def _wait_for(at: Station, run: Run, *, quiet: bool) -> Run:
    """Wait for the run's end; say on stderr what state it comes into."""
    said = None
    while True:
        run = find_run(at, run.id)
        if run.state is not said and not quiet:
            click.echo(
                f"run {run.id} of {run.name} is {run.state}" + (f": {run.reason}" if run.reason else ""), err=True
            )
        said = run.state
        if run.state.is_final:
            return run
        time.sleep(LOOK_EVERY)
