"""What ``import llmtasks`` gives, what it costs, and what it does not do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import llmtasks
from llmtasks import errors
from llmtasks.options import CELERY_OPTIONS, TaskOptions
from llmtasks.registered import RegisterOptions

#: Seconds of CPU that the import may take beside celery and sqlalchemy. Twice what is promised for an idle machine: the
#: processes of other tests make each second of CPU worth less.
LIMIT = 0.3
IMPORT = """
import json, sys, time

opened = []

def note(event, arguments):
    if event in {"socket.connect", "socket.bind", "sqlite3.connect", "subprocess.Popen", "os.fork", "os.mkdir"}:
        opened.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        opened.append(f"{event} {arguments[0]}")

import celery.app.task, celery.canvas, celery.signals, sqlalchemy
sys.addaudithook(note)
begun = time.process_time()
import llmtasks
print(json.dumps({"seconds": time.process_time() - begun, "opened": opened, "modules": sorted(sys.modules)}))
"""


def imported(folder: Path) -> dict[str, Any]:
    """Import llmtasks in a new process; what that cost and opened."""
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=folder, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_the_package_exports_what_it_says() -> None:
    """``__all__`` names every public name, and nothing else is public but modules."""
    modules = {name.removeprefix("llmtasks.") for name in sys.modules if name.startswith("llmtasks.")}
    public = {name for name in vars(llmtasks) if not name.startswith("_")}

    assert sorted(llmtasks.__all__) == list(llmtasks.__all__)
    assert public - modules <= set(llmtasks.__all__)
    assert set(llmtasks.__all__) <= public
    assert callable(llmtasks.install)


def test_the_seeds_names_are_where_its_imports_look() -> None:
    """The modules of the text, on our paths, export the same objects as the package."""
    from llmtasks import metrics, monitor, retry, task

    assert retry.retry_with_backoff is llmtasks.retry_with_backoff
    assert monitor.TaskMonitor is llmtasks.TaskMonitor
    assert metrics.track_task_performance is llmtasks.track_task_performance
    assert task.Task is llmtasks.Task


def test_every_error_is_an_llmtasks_error_and_documented_in_the_tree() -> None:
    """One tree, drawn at the top of its module."""
    classes = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)]

    assert all(issubclass(item, llmtasks.LLMTasksError) for item in classes)
    assert all(item.__name__ in (errors.__doc__ or "") for item in classes)
    assert all(item.__doc__ for item in classes)


def test_the_types_of_the_decorator_name_every_option() -> None:
    """What a type checker allows is what the decorator takes."""
    own = set(TaskOptions.__dataclass_fields__) - {"name", "celery"}

    assert set(get_type_hints(RegisterOptions)) == (own | CELERY_OPTIONS | {"acks_late"}) - {"bind"}


def test_importing_opens_nothing(tmp_path: Path) -> None:
    """No socket, no database, no file, no process; and what only some processes need is not loaded."""
    found = imported(tmp_path)

    assert found["opened"] == []
    assert list(tmp_path.iterdir()) == []
    unwanted = {"alembic", "psutil", "psycopg", "redis", "flower", "prometheus_client", "httpx", "llmtasks.beat"}
    assert unwanted & set(found["modules"]) == set()


def test_importing_is_quick(tmp_path: Path) -> None:
    """The best of three: what is slow and seldom needed is imported where it is used."""
    seconds = min(imported(tmp_path)["seconds"] for _ in range(3))

    assert seconds < LIMIT
