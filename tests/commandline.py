"""The command line, called in this process on the app that is current; an app that has no processes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from click.testing import CliRunner, Result

from llmtasks.cli import llmtasks
from tests.processes import app_in_this_process

CELERYCONFIG = """
import os
broker_url = os.environ["LLMTASKS_BROKER_URL"]
result_backend = "cache+memory://"
imports = ["tasks"]
"""


def command(*arguments: str) -> Result:
    """Run a command to its end."""
    return CliRunner().invoke(llmtasks, arguments, prog_name="llmtasks")


def document(*arguments: str, exit_code: int = 0) -> Any:
    """The document that a command prints with --json."""
    done = command(*arguments, "--json")
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


@contextmanager
def app_with(folder: Path, tasks: str, **environ: str) -> Iterator[Celery]:
    """An app in this process: no worker, no beat, kombu's memory as its broker unless ``environ`` says otherwise."""
    (folder / "celeryconfig.py").write_text(CELERYCONFIG)
    (folder / "tasks.py").write_text(tasks)
    given = {"LLMTASKS_HOME": str(folder / "home"), "LLMTASKS_BROKER_URL": "memory://", **environ}
    with app_in_this_process(folder, given) as app:
        yield app
