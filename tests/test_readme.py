"""What the READMEs say is so: their code runs, their tables are those of the code, both languages say the same."""

import importlib
import io
import json
import re
import shlex
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import pytest

from llmtasks import settings
from llmtasks.cli import llmtasks as commands
from llmtasks.options import TaskOptions
from llmtasks.settings import Settings
from tests.conftest import or_without
from tests.processes import CeleryProcess, Project
from tests.servers import PostgreSQL, Valkey, valkey

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
BOTH = pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda path: path.name)

#: Runs the blocks of a file, one after the other, in one namespace, with ``await`` allowed at top level.
RUNNER = """
import ast, asyncio, inspect, json, sys

async def main():
    namespace = {"__name__": "__main__"}
    for name, line, text in json.load(open(sys.argv[1], encoding="utf-8")):
        code = compile("\\n" * line + text, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        made = eval(code, namespace)
        if inspect.iscoroutine(made):
            await made

asyncio.run(main())
"""

#: What the guide's blocks, which run before, have caused.
GUIDE_CAUSED = """
import time
from llmtasks.store import runs
assert text == "47 is searchable"
assert [item.get(timeout=60) for item in results] == [f"{n} is searchable" for n in (43, 44, 45)]
assert task.state == "cancelled", task
assert {item.name for item in tasks} == {"periodic_task"}, tasks
assert run.schedule_id == task.id
assert [worker.name for worker in stats.workers] == ["worker@readme"]
one_off = await Task.get("one_time_task")
assert one_off.state == "active"
assert timedelta(minutes=58) < one_off.next_run_at.astimezone() - datetime.now().astimezone() < timedelta(minutes=61)
deadline = time.monotonic() + 60
while not (state := (await TaskMonitor.get_task_status(run.id)).state).is_final:
    assert time.monotonic() < deadline, state
    time.sleep(0.1)
assert await ask_model("a question") == "an answer"
"""

FASTAPI_WORKS = """
import asyncio
import httpx

transport = httpx.ASGITransport(app=api)
async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
    run_id = (await client.post("/documents/7")).json()["run"]
    deadline = asyncio.get_running_loop().time() + 60
    while (status := (await client.get(f"/status/{run_id}")).json())["state"] != "succeeded":
        assert asyncio.get_running_loop().time() < deadline, status
        await asyncio.sleep(0.1)
    assert status["last_run"]["result"] == "7 is searchable", status
    task_id = (await client.post("/documents/8/later")).json()["task"]
    status = (await client.get(f"/status/{task_id}")).json()
    assert (status["kind"], status["state"]) == ("task", "active"), status
    assert (await client.delete("/runs/a-run-that-has-not-come-yet")).status_code == 200
"""

SHOP_WORKS = """
import time
from shop import app, count, summarise
from llmtasks import Task
from llmtasks.monitor import TaskMonitor

assert count.delay().get(timeout=60) == 1
assert summarise.delay("17").get(timeout=60) == "order 17: fine"
deadline = time.monotonic() + 60
while True:
    found = Task.list_sync(name="count-often")
    if found and (last := TaskMonitor.get_task_status_sync(found[0].id).last_run) and last.state == "skipped":
        break
    assert time.monotonic() < deadline, found
    time.sleep(0.1)
assert last.reason == "handed to Celery", last
"""

SERVERS_WORK = """
from tasks import process_document
from llmtasks import Task

assert process_document.delay("1").get(timeout=60) == "1 is searchable"
task = await Task(func_name="process_document", params={"doc_id": "2"}, interval_minutes=5).save()
run = await task.execute_now()
assert process_document.AsyncResult(run.id).get(timeout=60) == "2 is searchable"
"""

#: For each input in a file: how evaluating it fails.
MISTAKES = """
import json, sys
from datetime import UTC, datetime
from llmtasks import Task
from llmtasks.settings import TaskDefaults
from tasks import process_document, task_registry

found = []
for line in json.load(open(sys.argv[1], encoding="utf-8")):
    try:
        found.append(["nothing", repr(eval(line))])
    except Exception as error:
        found.append([type(error).__name__, str(error)])
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is the number of its fence."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that it is, if its first line names one."""
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found[1] if found else None


def blocks_of(readme: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks, in their order."""
    found: list[Block] = []
    lines = readme.read_text("utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        assert lines[end] == "```", f"{readme.name}:{end + 1}"
        found.append(Block(lines[begin][3:], "\n".join(lines[begin + 1 : end]) + "\n", begin + 1))
    return [block for block in found if language in {None, block.language}]


def outside_blocks(readme: Path) -> str:
    return re.sub(r"^```.*?^```$", "", readme.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def tables_of(readme: Path) -> list[list[list[str]]]:
    """The tables: rows of cells, without the heading and the line below it."""
    found: list[list[list[str]]] = [[]]
    for line in outside_blocks(readme).splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif found[-1]:
            found.append([])
    return [table[2:] for table in found if table]


def table_with(readme: Path, first: str) -> list[list[str]]:
    """The table whose first row begins with ``first``."""
    (found,) = [table for table in tables_of(readme) if table[0][0] == first]
    return found


def without_comments(block: Block) -> str:
    if block.language != "python":
        return re.sub(r"[ \t]+#.*", "", block.text)
    tokens = tokenize.generate_tokens(io.StringIO(block.text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    lines = block.text.splitlines()
    for token in comments:
        row, column = token.start
        lines[row - 1] = lines[row - 1][:column].rstrip()
    return "\n".join(lines)


# Both languages


def test_both_readmes_have_the_same_structure() -> None:
    """Headings of the same levels, as many tables with as many rows, in the same order."""
    levels = [re.findall(r"^(#+) ", outside_blocks(readme), re.MULTILINE) for readme in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]

    sizes = [[len(table) for table in tables_of(readme)] for readme in (ENGLISH, CHINESE)]
    assert sizes[0] == sizes[1]


def test_both_readmes_have_the_same_code() -> None:
    """Their blocks differ in comments only."""
    english, chinese = blocks_of(ENGLISH), blocks_of(CHINESE)
    assert [block.language for block in english] == [block.language for block in chinese]
    for one, other in zip(english, chinese, strict=True):
        assert without_comments(one) == without_comments(other), f"line {one.line} and line {other.line}"


@pytest.mark.parametrize("first", ["`LLMTASKS_APP`", "`LLMTASKS_IMPORTS`", "`name`", "`flower`"])
def test_both_readmes_name_the_same_options(first: str) -> None:
    """The first columns of the tables of settings, options and extras are the same."""
    names = [[re.findall(r"`\w+`", row[0]) for row in table_with(readme, first)] for readme in (ENGLISH, CHINESE)]
    assert names[0] == names[1]


def test_both_readmes_show_the_same_errors() -> None:
    """Messages are not translated, because the code does not translate them."""
    first = "`task_registry.register(max_retry=3)(print)`"
    assert table_with(ENGLISH, first) == table_with(CHINESE, first)


@BOTH
def test_links_lead_somewhere(readme: Path) -> None:
    """Every relative link names a file or folder of the repository."""
    links = re.findall(r"\]\(([^)#]+)\)", outside_blocks(readme))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
    assert len(links) > 5


# Tables


@BOTH
def test_settings_table_lists_exactly_the_settings(readme: Path) -> None:
    """One row for each field of Settings that is read by that name, with its default where that is a plain value."""
    rows = table_with(readme, "`LLMTASKS_APP`")
    # timezone is Celery's, tasks is TASK_CONFIG.
    wanted = {item.name: item.default for item in fields(Settings) if item.name not in {"timezone", "tasks"}}
    assert [row[0] for row in rows] == [f"`LLMTASKS_{name.upper()}`" for name in wanted]
    assert [row[1] for row in rows] == [f"`llmtasks_{name}`" for name in wanted]
    for row, default in zip(rows, wanted.values(), strict=True):
        if isinstance(default, int | float):
            assert row[2] == str(default), row


@BOTH
def test_settings_of_the_table_are_read(readme: Path, tmp_path: Path) -> None:
    """Each variable reaches Settings, and each key of Celery's configuration wins over it."""
    urls = {"database_url": "sqlite:////a.db", "broker_url": "redis://a", "result_url": "redis://b"}
    texts: dict[str, Any] = {"app": "one", "home": str(tmp_path), **urls}
    choices = {"redis_transport": ("stock", "llmtasks")}
    for variable, key, *_ in table_with(readme, "`LLMTASKS_APP`"):
        name = key.strip("`").removeprefix("llmtasks_")
        value = choices[name][0] if name in choices else texts.get(name, "6")
        environ = {f"LLMTASKS_{item.upper()}": text for item, text in texts.items()} | {"LLMTASKS_HEARTBEAT": "1"}
        environ[variable.strip("`")] = value
        assert str(getattr(settings.read({}, environ), name)) in {value, f"{value}.0"}

        other = value + "x" if name in texts else "5.5" if name != "keep_bytes" else "5"
        other = choices[name][1] if name in choices else other
        assert str(getattr(settings.read({key.strip("`"): other}, environ), name)) == other


@BOTH
def test_variables_of_celeryconfig_are_all_listed(readme: Path) -> None:
    """The second table names what celeryconfig.py itself reads."""
    read = re.findall(r"os\.environ\.get\(\"(LLMTASKS_\w+)\"", (ROOT / "celeryconfig.py").read_text())
    assert sorted(row[0].strip("`") for row in table_with(readme, "`LLMTASKS_IMPORTS`")) == sorted(read)


@BOTH
def test_options_table_lists_exactly_the_options_of_register(readme: Path) -> None:
    """One row or part of a row for each option of the decorator."""
    named = [name for row in table_with(readme, "`name`") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted({item.name for item in fields(TaskOptions)} - {"celery"} | {"config"})


@BOTH
def test_extras_exist(readme: Path) -> None:
    """Each extra that the READMEs name can be installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {row[0].strip("`") for row in table_with(readme, "`flower`")}
    assert named <= set(project["optional-dependencies"])


@BOTH
def test_imports_of_the_mapping_exist(readme: Path) -> None:
    """What the right column imports can be imported."""
    rows = table_with(readme, "`from app.core.tasks import task_registry`")
    assert len(rows) == 5
    for _, statement in rows:
        found = re.fullmatch(r"`from ([\w.]+) import (\w+)`", statement)
        assert found is not None, statement
        assert hasattr(importlib.import_module(found[1]), found[2]), statement


# Commands


@BOTH
def test_commands_of_the_shell_blocks_exist(readme: Path) -> None:
    """Make targets, subcommands with their options, and variables are those that there are."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    variables = set(re.findall(r"`(LLMTASKS_\w+)`", readme.read_text("utf-8")))
    for block in blocks_of(readme, "sh"):
        for line in without_comments(block).splitlines():
            words = shlex.split(line)
            if words[0] == "celery":
                assert words[1] == "llmtasks", line
                words = words[1:]
            match words:
                case ["make", target]:
                    assert target in targets, line
                case ["export", assignment]:
                    assert assignment.partition("=")[0] in variables, line
                case ["llmtasks", name, *rest]:
                    check_command(name, rest)
                case [("." | "kill" | "pip"), *_]:
                    pass
                case _:
                    pytest.fail(f"nobody checks this line: {line}")


def check_command(name: str, words: list[str]) -> None:
    """Fail where ``llmtasks name`` would not understand ``words``."""
    command = commands.get_command(click.Context(commands), name)
    assert command is not None, name
    command.make_context(name, list(words), resilient_parsing=False)


# Code


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Workshop]":
    """A broker and a folder for projects."""
    folder = tmp_path_factory.mktemp("readme")
    with or_without(valkey(folder / "broker", unix=True)) as broker:
        made = Workshop(folder, broker)
        yield made
        made.close()


class Workshop:
    """Makes projects of the files that the README shows, each with its own database and its part of the broker."""

    def __init__(self, folder: Path, broker: Valkey) -> None:
        self._folder = folder
        self._broker = broker
        self._projects: list[Project] = []

    def project(self, name: str) -> Project:
        """A folder with the README's files and without a Celery configuration."""
        url = f"sqlite:///{self._folder / name / 'llmtasks.db'}"
        made = Project(self._folder / name, broker=self._broker, database_url=url, celeryconfig="")
        made.environ["LLMTASKS_BROKER_URL"] = self._broker.database(len(self._projects))
        made.environ["LLMTASKS_RESULT_URL"] = made.environ["LLMTASKS_BROKER_URL"]
        self._projects.append(made)
        for block in blocks_of(ENGLISH, "python"):
            if block.file is not None:
                made.write(block.file, block.text)
        made.write("runner.py", RUNNER)
        made.write("mistakes.py", MISTAKES)
        return made

    def close(self) -> None:
        """End what runs in the projects."""
        for project in self._projects:
            project.close()


def start_worker(project: Project, app: str) -> CeleryProcess:
    """Start a worker of an app that the README shows."""
    options = ["-l", "INFO", "-c", "2", "-n", "worker@readme", "--without-gossip", "--without-mingle"]
    return project.celery("-A", app, "worker", *options, ready="worker@readme ready.", name=f"worker-{app}")


@pytest.fixture(scope="module")
def project(workshop: Workshop) -> Project:
    """A project whose worker runs the README's first app."""
    made = workshop.project("first")
    start_worker(made, "tasks")
    return made


def run_blocks(project: Project, blocks: list[tuple[str, int, str]]) -> None:
    """Run blocks in one process of the project, one after the other."""
    project.write("blocks.json", json.dumps(blocks))
    done = project.run([sys.executable, "runner.py", "blocks.json"], timeout=150)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.redis
@pytest.mark.slow
def test_blocks_of_the_guide_run_one_after_the_other(project: Project) -> None:
    """From the first call to the last: in one process, against a real worker, with what they say as the result."""
    guide = [block for block in blocks_of(ENGLISH, "python") if block.file is None]
    assert len(guide) >= 10

    blocks = [(f"README.md:{block.line}", block.line, block.text) for block in guide]
    run_blocks(project, [*blocks, ("what the guide caused", 0, GUIDE_CAUSED)])


@pytest.mark.redis
@pytest.mark.slow
def test_fastapi_example_serves(project: Project) -> None:
    """Its four routes send, store, show and cancel."""
    (example,) = [block for block in blocks_of(ENGLISH, "python") if block.file == "main.py"]

    run_blocks(project, [("main.py", 0, example.text), ("its use", 0, FASTAPI_WORKS)])


@pytest.mark.redis
@pytest.mark.slow
def test_existing_app_keeps_its_tasks_and_its_beat_schedule(workshop: Workshop) -> None:
    """Its own task runs, the registered one too, and beat hands its beat_schedule over."""
    project = workshop.project("shop")
    start_worker(project, "shop")
    project.celery("-A", "shop", "beat", "-l", "INFO", ready="beat: Starting...", name="beat-of-shop")

    run_blocks(project, [("the use of shop.py", 0, SHOP_WORKS)])


@pytest.mark.redis
@pytest.mark.postgresql
@pytest.mark.slow
def test_two_variables_and_migrate_lead_to_postgresql_and_redis(
    workshop: Workshop, postgresql_server: PostgreSQL, tmp_path: Path
) -> None:
    """The section's lines, with the addresses of servers that there are; then the first example works on them."""
    (lines,) = [block.text for block in blocks_of(ENGLISH, "sh") if "LLMTASKS_DATABASE_URL" in block.text]
    database = postgresql_server.create_database()
    with valkey(tmp_path / "redis") as redis:
        addresses = iter([database, redis.url])
        script = re.sub(r"=\S+://\S+", lambda _: f"={shlex.quote(next(addresses))}", lines)
        project = workshop.project("servers")
        del project.environ["LLMTASKS_RESULT_URL"]
        project.environ["LLMTASKS_DATABASE_URL"], project.environ["LLMTASKS_BROKER_URL"] = database, redis.url

        script = script.replace("celery ", f"{sys.executable} -m celery -A tasks ")
        done = project.run(["sh", "-ec", script])
        assert done.returncode == 0, done.stderr
        worker = start_worker(project, "tasks")
        run_blocks(project, [("the use of the servers", 0, SERVERS_WORK)])
        worker.terminate()
    postgresql_server.drop_database(database)


@pytest.mark.redis
def test_wrong_input_fails_as_the_table_says(workshop: Workshop) -> None:
    """Each row's input is evaluated: its error and its message are those of the row; ``(...)`` stands for anything."""
    rows = table_with(ENGLISH, "`task_registry.register(max_retry=3)(print)`")
    project = workshop.project("mistakes")
    project.write("inputs.json", json.dumps([row[0].strip("`") for row in rows]))

    done = project.run([sys.executable, "mistakes.py", "inputs.json"], timeout=120)

    assert done.returncode == 0, done.stderr
    for (source, kind, message), (found, said) in zip(rows, json.loads(done.stdout), strict=True):
        assert kind == f"`{found}`", f"{source}: {found}: {said}"
        pattern = re.escape(message).replace(re.escape("(...)"), r"\(.+?\)")
        assert re.fullmatch(pattern, said), f"{source}: {said}"


@BOTH
def test_tests_that_prove_the_promises_are_there(readme: Path) -> None:
    """Each promise names a test that proves it, by its file and its name, and there is such a test."""
    rows = re.findall(r"^\| (\d+) \| (.*`tests/.*) \|$", readme.read_text("utf-8"), re.MULTILINE)
    promises = re.findall(r"^(\d+)\. \*\*", readme.read_text("utf-8"), re.MULTILINE)

    assert [number for number, _ in rows] == promises
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", "".join(tests for _, tests in rows)):
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), f"{file}::{name}"
