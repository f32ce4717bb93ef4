"""``llmtasks broker``: the embedded broker in the foreground."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
from pathlib import Path

import click

from llmtasks import settings
from llmtasks.broker import EmbeddedBroker
from llmtasks.errors import ConfigurationError, LLMTasksError
from llmtasks.settings import Settings

#: How often the command looks whether its server still lives, in seconds.
_LOOK_EVERY = 0.5


@click.command("broker")
@click.option("-A", "--app", "app_name", help="The Celery app; by default celeryconfig.py of the current folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready: url, pid, home.")
@click.pass_context
def broker(context: click.Context, app_name: str | None, as_json: bool) -> None:
    """Run the embedded broker until Ctrl-C.

    A private Valkey server on a unix socket in the data directory (LLMTASKS_HOME). What it took survives its end.
    """
    stop = threading.Event()
    try:
        found = read_settings(context, app_name)
        embedded = EmbeddedBroker(home_of(found))

        def end(*_: object) -> None:
            if stop.is_set():
                embedded.kill()
            stop.set()

        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, end)
        with embedded:
            if as_json:
                click.echo(json.dumps({"url": embedded.url, "pid": embedded.pid, "home": str(embedded.home)}))
            else:
                click.echo(f"broker ready on {embedded.url} (pid {embedded.pid}); Ctrl-C stops it")
            if embedded.restored:
                click.echo(f"requeued {embedded.restored} messages that dead workers held", err=True)
            if found.broker_url != embedded.url:
                click.echo("note: the app's broker_url is another one, so the app does not use this broker", err=True)
            while not stop.wait(_LOOK_EVERY):
                if embedded.exit_code is not None:
                    raise click.ClickException(f"the broker ended (exit {embedded.exit_code}); see {embedded.log}")
    except LLMTasksError as error:
        raise click.ClickException(str(error)) from error


def read_settings(context: click.Context, app_name: str | None) -> Settings:
    """Settings of the app that the command line names, else of the current folder's celeryconfig.py.

    Raises:
        ConfigurationError: The app cannot be loaded, or a setting is wrong.
    """
    if os.getcwd() not in sys.path:  # noqa: PTH109 - a string is compared
        # As `celery` and `python -m celery` do, so that all find the same celeryconfig.py.
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    app = getattr(context.obj, "app", None)  # `celery -A app llmtasks ...` has loaded it
    if app is None and app_name is not None:
        from celery.app.utils import find_app

        try:
            app = find_app(app_name)
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(f"--app={app_name!r}: expected a module with a Celery app ({error})") from error
    if app is None and importlib.util.find_spec(os.environ.get("CELERY_CONFIG_MODULE") or "celeryconfig"):
        from celery import current_app as app
    return settings.read(app.conf if app is not None else None)


def home_of(found: Settings) -> Path:
    """The data directory, where there must be one.

    Raises:
        ConfigurationError: Nothing says where it is.
    """
    if found.home is None:
        raise ConfigurationError(
            "the embedded broker needs a data directory: set LLMTASKS_HOME, or work in a folder with a celeryconfig.py"
        )
    return found.home
