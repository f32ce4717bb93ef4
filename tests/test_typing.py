"""Type checkers reject wrong arguments of ``.delay`` where celery-types is not installed, too.

What they say with it is in tests/typing/api.py, which ``make check`` has checked.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
SITE = next(Path(path) for path in sys.path if path.endswith("site-packages"))
#: What an application's author writes; a line with "wrong" must be reported, the others must not.
APPLICATION = """
from llmtasks import Task, task_registry


@task_registry.register(name="process_document", max_retries=3)
async def process_document(doc_id: str, pages: int = 1) -> int:
    return pages


@task_registry.register
def plain(x: int) -> None:
    print(x)


process_document.delay("1", pages=2)
process_document.delay(1)  # wrong
process_document.delay("1", page=2)  # wrong
process_document.delay()  # wrong
plain.delay(1)
plain.delay("1")  # wrong
plain("1")  # wrong
Task(func_name="plain", interval_minutes="often")  # wrong
Task(func_name="plain", interval_minutes=5)
"""
WRONG = [number for number, line in enumerate(APPLICATION.splitlines(), 1) if line.endswith("# wrong")]

pytestmark = pytest.mark.slow


@pytest.fixture
def application(tmp_path: Path) -> Path:
    """A project whose environment has everything but celery-types."""
    packages = tmp_path / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    for item in SITE.iterdir():
        if item.name != "celery-stubs":
            (packages / item.name).symlink_to(item)
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    (packages / "llmtasks").symlink_to(REPOSITORY / "llmtasks")
    (tmp_path / "app.py").write_text(APPLICATION)
    return tmp_path


def test_mypy_rejects_wrong_arguments_without_celery_types(application: Path) -> None:
    """As if celery had no types at all."""
    configuration = application / "mypy.ini"
    configuration.write_text(
        "[mypy]\nstrict = true\n[mypy-celery.*]\nfollow_imports = skip\n[mypy-kombu.*]\nfollow_imports = skip\n"
        "[mypy-llmtasks.*]\nfollow_imports = silent\n"
    )
    done = run("mypy", "--config-file", str(configuration), "--no-error-summary", "app.py", cwd=application)

    found = [int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line]
    assert found == WRONG, done.stdout


def test_pyright_rejects_wrong_arguments_without_celery_types(application: Path) -> None:
    """What it infers from Celery's sources does not get in the way."""
    settings = {"include": ["app.py"], "venvPath": ".", "venv": "venv", "typeCheckingMode": "basic"}
    (application / "pyrightconfig.json").write_text(json.dumps(settings))
    done = run("pyright", "-p", ".", "--outputjson", cwd=application)

    diagnostics: list[dict[str, Any]] = json.loads(done.stdout)["generalDiagnostics"]
    found = [item["range"]["start"]["line"] + 1 for item in diagnostics if item["severity"] == "error"]
    assert found == WRONG, diagnostics


def run(tool: str, *arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([Path(sys.executable).parent / tool, *arguments], cwd=cwd, capture_output=True, text=True)
