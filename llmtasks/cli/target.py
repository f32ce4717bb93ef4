"""What a command works on: the app, the Task or run that an argument names, spans of time."""

from __future__ import annotations

import getpass
import re
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from llmtasks import sender
from llmtasks.dispatch import Station, station
from llmtasks.errors import ConfigurationError, NotFoundError, TaskNotFoundError

if TYPE_CHECKING:
    from llmtasks.task import Task

_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_SPAN: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*")


def station_of(context: click.Context, *, functions: bool = False) -> Station:
    """The app that the command line names, else the current folder's, with its settings and database.

    Args:
        functions: Import the modules that register task functions.

    Raises:
        ConfigurationError: The app or one of its modules cannot be loaded, or a setting is wrong.
    """
    app: Any = getattr(context.obj, "app", None) or sender.current_app()
    try:
        app.set_current()
        app.set_default()
        at = station(app)
        if functions:
            app.loader.import_default_modules()
    except ImportError as error:
        raise ConfigurationError(f"the app's modules cannot be imported: {error}") from error
    return at


def task_named(id_or_name: str) -> Task | None:
    """The Task with this id or name; None where there is none.

    Raises:
        TaskNotFoundError: Several share the name.
    """
    from llmtasks.task import Task

    try:
        return Task.get_sync(id_or_name)
    except TaskNotFoundError:
        if Task.list_sync(name=id_or_name, limit=2):
            raise
        return None


def task_like(id_or_name: str) -> Task:
    """The Task with this id or name.

    Raises:
        TaskNotFoundError: There is none, or several share the name.
    """
    from llmtasks.task import Task

    return Task.get_sync(id_or_name)


def user() -> str | None:
    """The name of who types the commands; None where the system has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may run under a number
        return None


def unknown(target: str) -> NotFoundError:
    """The error for an argument that names nothing."""
    return NotFoundError(
        f"no Task has the id or name {target!r}, and no run the id; `llmtasks schedules` and `llmtasks runs` list them"
    )


def may_be_run(text: str) -> bool:
    """Whether a text looks like the id that Celery gives a run."""
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def read_span(_context: click.Context, _parameter: click.Parameter, value: str | None) -> timedelta | None:
    """Read a length of time: 90s, 15m, 12h, 30d, 2w."""
    if value is None:
        return None
    found = _SPAN.fullmatch(value)
    try:
        if found is not None:
            return timedelta(seconds=float(found[1]) * _UNITS[found[2]])
    except OverflowError:
        pass
    raise click.BadParameter(f"{value!r}: expected a number and a unit, such as 90s, 15m, 12h, 30d or 2w")


def read_since(context: click.Context, parameter: click.Parameter, value: str | None) -> datetime | None:
    """Read an instant: so long ago (2h), or as ISO 8601 (2026-01-31, 2026-01-31T08:00+01:00), local without a zone."""
    if value is None:
        return None
    try:
        if _SPAN.fullmatch(value):
            return datetime.now(UTC) - (read_span(context, parameter, value) or timedelta())
        return datetime.fromisoformat(value).astimezone(UTC)
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{value!r}: expected so long ago, such as 2h, or an ISO 8601 instant") from None
