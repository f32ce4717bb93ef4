"""``celery llmtasks ...`` and ``llmtasks ...``: the same commands, found by the first under Celery's own options.

Exit codes: 0 done, 1 an error or nothing found, 2 a command that cannot be read; of ``doctor`` 0 nothing that bad, 1
findings, 2 it could not be examined.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any, Final

import click

from llmtasks.errors import ConfigurationError, LLMTasksError

#: Commands and where they are; a module is imported when its command is used.
COMMANDS: Final = {
    "schedules": "llmtasks.cli.reading:schedules",
    "runs": "llmtasks.cli.reading:runs",
    "show": "llmtasks.cli.showing:show",
    "next": "llmtasks.cli.reading:next_runs",
    "why": "llmtasks.cli.explaining:why",
    "run": "llmtasks.cli.control:run",
    "pause": "llmtasks.cli.pausing:pause",
    "resume": "llmtasks.cli.pausing:resume",
    "cancel": "llmtasks.cli.control:cancel",
    "backfill": "llmtasks.cli.backfill:backfill",
    "doctor": "llmtasks.cli.examining:doctor",
    "purge": "llmtasks.cli.upkeep:purge",
    "migrate": "llmtasks.cli.upkeep:migrate",
    "broker": "llmtasks.cli.broker:broker",
    "dev": "llmtasks.cli.dev:dev",
}
#: The exit code of ``doctor`` where it could not look: 1 is that it found something.
UNEXAMINED: Final = 2


class UnexaminedError(click.ClickException):
    """``doctor`` could not look."""

    exit_code = UNEXAMINED


class Commands(click.Group):
    """Commands imported at their first use; an error of ours ends as one line, not as a traceback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Stand-ins: click looks here for the names that are near to an unknown one.
        self.commands = {name: click.Command(name) for name in COMMANDS}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command with this name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LLMTasksError as error:
            failure = UnexaminedError if ctx.invoked_subcommand == "doctor" else click.ClickException
            raise failure(str(error)) from error


@dataclass(frozen=True, slots=True)
class Chosen:
    """What ``celery`` hands its own commands: the app."""

    app: Any


@click.group("llmtasks", cls=Commands)
@click.option("-A", "--app", metavar="NAME", help="The Celery app; by default celeryconfig.py of the current folder.")
@click.version_option(package_name="llmtasks")
@click.pass_context
def llmtasks(context: click.Context, app: str | None) -> None:
    """Schedules and runs of LLM and RAG tasks on Celery."""
    if os.getcwd() not in sys.path:  # noqa: PTH109 - a string is compared
        # As `celery` and `python -m celery` do, so that all find the same celeryconfig.py.
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    if app is not None:
        context.obj = Chosen(_load(app))


def main() -> None:
    """The ``llmtasks`` program."""
    llmtasks(prog_name="llmtasks")


def _load(name: str) -> Any:
    from celery.app.utils import find_app

    try:
        return find_app(name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"--app={name!r}: expected a module with a Celery app ({error})") from error
