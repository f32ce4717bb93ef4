"""The command line: tables for people, JSON for machines, exit codes; on a ledger of rows."""

import getpass
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmtasks.cli import COMMANDS, llmtasks, tables
from llmtasks.dispatch import Station, station
from llmtasks.states import RunState, ScheduleState
from llmtasks.store import rows
from llmtasks.task import Task
from tests.processes import REPOSITORY, app_in_this_process

PROGRAM = str(Path(sys.executable).with_name("llmtasks"))
CELERYCONFIG = """
import os
broker_url = os.environ["LLMTASKS_BROKER_URL"]
result_backend = os.environ["LLMTASKS_RESULT_URL"]
imports = ["tasks"]
"""
TASKS = """
from llmtasks.registry import task_registry

@task_registry.register(name="add", priority=2)
def add(x: int, y: int = 2) -> int:
    return x + y
"""


class Shop:
    """A project's folder with a ledger, and the command line in this process."""

    def __init__(self, folder: Path, at: Station) -> None:
        self.folder, self.at = folder, at
        self._count = 0

    def command(self, *arguments: str, input: str | None = None) -> Result:
        """Run the command line to its end."""
        return CliRunner().invoke(llmtasks, arguments, input=input, prog_name="llmtasks")

    def text(self, *arguments: str) -> str:
        """What a command that ends well prints."""
        done = self.command(*arguments)
        assert done.exit_code == 0, done.output
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """The document that a command prints with --json."""
        return json.loads(self.text(*arguments, "--json"))

    def run(self, state: RunState = RunState.SUCCEEDED, **columns: Any) -> str:
        """A run that is in the ledger."""
        self._count += 1
        now = self.at.database.now()
        row = {
            "id": f"00000000-0000-4000-8000-{self._count:012}", "app": self.at.name, "func_name": "add", "name": "add",
            "state": state, "priority": 5, "created_at": now, "delivered": state.is_final,
            "ended_at": now if state.is_final else None, "args": "[]", "kwargs": '{"x": 1}', **columns,
        }  # fmt: skip
        with self.at.database.transaction() as tx:
            tx.execute(rows.runs.insert().values(row))
        return str(row["id"])

    def task(self, name: str = "nightly", **options: Any) -> Task:
        """A stored Task."""
        return Task(
            name=name, func_name="add", **{"params": {"x": 1}, "schedule": "0 0 * * *", "timezone": "UTC"} | options
        ).save_sync()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    (tmp_path / "celeryconfig.py").write_text(CELERYCONFIG)
    (tmp_path / "tasks.py").write_text(TASKS)
    environ = {
        "LLMTASKS_HOME": str(tmp_path / ".llmtasks"),
        "LLMTASKS_BROKER_URL": "memory://",
        "LLMTASKS_RESULT_URL": "cache+memory://",
    }
    with app_in_this_process(tmp_path, environ) as app:
        yield Shop(tmp_path, station(app))


# -- the commands themselves


def test_help_names_every_command(shop: Shop) -> None:
    """The help of the group and of each command can be read without an app."""
    listed = shop.text("--help")

    assert all(f"\n  {name} " in listed for name in COMMANDS)
    for name in COMMANDS:
        assert shop.text(name, "--help").startswith(f"Usage: llmtasks {name} ")


def test_unknown_command_and_bad_options_are_usage_errors(shop: Shop) -> None:
    """Exit code 2, and what is wrong on stderr."""
    for arguments, complaint in {
        ("scedules",): "No such command 'scedules'",
        ("runs", "--state", "done"): "'done' is not one of",
        ("runs", "--since", "yesterday"): "'yesterday': expected so long ago, such as 2h",
        ("run", "add", "--params", "[1]"): "expected a JSON object",
        ("run", "add", "--params", "{x"): "is not JSON",
        ("purge", "--older-than", "9 moons"): "such as 90s, 15m, 12h, 30d or 2w",
        ("show",): "Missing argument",
    }.items():
        done = shop.command(*arguments)
        assert (done.exit_code, done.stdout) == (2, ""), arguments
        assert complaint in done.stderr, arguments


def test_error_is_one_line_on_stderr(shop: Shop) -> None:
    """No traceback, nothing on stdout, exit code 1."""
    for arguments, complaint in {
        ("show", "nobody"): "no Task has the id or name 'nobody'",
        ("pause", "nobody"): "no Task has the id or name 'nobody'",
        ("next", "nobody"): "no Task has the id or name 'nobody'",
        ("cancel", "nobody"): "no Task has the id or name 'nobody'",
        ("run", "ad"): "did you mean 'add'?",
        ("run", "add", "--params", '{"z": 1}'): "do not fit its signature",
        ("run", "add"): "missing a required argument: 'x'",
        ("runs", "--schedule", "nobody"): "no Task has the id or name 'nobody'",
        ("-A", "no_such_module", "runs"): "--app='no_such_module': expected a module with a Celery app",
    }.items():
        done = shop.command(*arguments)
        assert (done.exit_code, done.stdout) == (1, ""), arguments
        assert done.stderr.startswith("Error: "), arguments
        assert complaint in done.stderr, arguments
        assert done.stderr.count("\n") == 1, arguments


def test_module_that_cannot_be_imported_is_one_line(shop: Shop) -> None:
    """An app whose task modules are broken says which import failed."""
    (shop.folder / "tasks.py").write_text("import no_such_library")
    sys.modules.pop("tasks", None)

    done = shop.command("run", "add")

    assert done.exit_code == 1
    assert "the app's modules cannot be imported: No module named 'no_such_library'" in done.stderr


# -- schedules, next, pause, resume, cancel


def test_schedules_are_a_table_for_people(shop: Shop) -> None:
    """One aligned row each; state and trigger in words; the zone of the times is said."""
    nightly, often = shop.task("nightly"), shop.task("often", schedule=None, timezone=None, interval_minutes=15)

    done = shop.command("schedules")
    head, first, second, *_ = done.stdout.splitlines()

    assert head.split("  ")[0] == "ID"
    assert first.startswith(f"{nightly.id}  nightly  active  0 0 * * * (UTC)  ")
    assert second.startswith(f"{often.id}  often    active  every 15 min     ")
    assert head.index("STATE") == first.index("active") == second.index("active")
    assert done.stderr.startswith("\nTimes: ")


def test_schedules_are_one_json_document_for_machines(shop: Shop) -> None:
    """Instants are ISO 8601 in UTC, params are values."""
    task = shop.task()

    (found,) = shop.json("schedules")

    assert (found["id"], found["name"], found["func_name"], found["state"]) == (task.id, "nightly", "add", "active")
    assert (found["schedule"], found["timezone"], found["params"]) == ("0 0 * * *", "UTC", {"x": 1})
    assert datetime.fromisoformat(found["next_run_at"]) == task.next_run_at
    assert found["next_run_at"].endswith("+00:00")


def test_schedules_are_filtered(shop: Shop) -> None:
    """By state and by task function; none is no error."""
    shop.task("one")
    shop.task("two").pause_sync()

    assert [task["name"] for task in shop.json("schedules", "--state", "paused")] == ["two"]
    assert len(shop.json("schedules", "--state", "paused", "--state", "active")) == 2
    assert shop.json("schedules", "--func", "other") == []
    assert shop.text("schedules", "--func", "other") == "no such schedule\n"


def test_policies_are_shown(shop: Shop) -> None:
    """What keeps a Task from running at each instant stands beside its trigger; ``show`` and JSON have every option."""
    task = shop.task(
        overlap="queue_one", misfire="all", misfire_window=timedelta(hours=1), max_runs=4, jitter_seconds=90,
        starts_at=datetime(2998, 1, 1, tzinfo=UTC), ends_at=datetime(2999, 1, 1, tzinfo=UTC),
    )  # fmt: skip

    listed, block, (document,) = shop.text("schedules"), shop.text("show", "nightly"), shop.json("schedules")

    local = [tables.local(instant) for instant in (task.starts_at, task.ends_at)]
    limits = f"from {local[0]}, until {local[1]}, 0 of 4 runs, up to 1 min 30 s later, overlap queue_one"
    assert f"0 0 * * * (UTC), {limits}  " in listed
    assert f"0 0 * * * (UTC), {limits}\n" in block
    assert "runs      0 of at most 4\n" in block
    for part in ('"misfire_window": 3600.0', '"jitter_seconds": 90', '"overlap": "queue_one"'):
        assert part in block
    assert (document["starts_at"], document["max_runs"], document["fired"]) == ("2998-01-01T00:00:00+00:00", 4, 0)
    assert len(shop.json("next", "nightly", "-n", "9")["next_runs"]) == 4


def test_empty_ledger_says_where_schedules_come_from(shop: Shop) -> None:
    """Those in code are not there before a beat has started."""
    assert shop.text("schedules") == "no schedule yet; those in code are stored when beat starts\n"


def test_task_is_paused_and_resumed_by_its_name(shop: Shop) -> None:
    """Each says the state that it led to."""
    shop.task()

    assert shop.text("pause", "nightly") == "nightly is paused\n"
    assert Task.get_sync("nightly").state is ScheduleState.PAUSED
    assert shop.text("resume", "nightly").startswith("nightly is active, its next run is at ")
    assert shop.json("pause", "nightly")["state"] == "paused"


def test_paused_task_says_who_paused_it_and_since_when(shop: Shop) -> None:
    """The user of the shell unless --by names somebody; resuming forgets both."""
    shop.task()

    mine = shop.json("pause", "nightly")
    shop.text("resume", "nightly")
    begin = shop.at.database.now()
    hers = shop.json("pause", "nightly", "--by", "alice")
    again = shop.json("pause", "nightly", "--by", "bob")
    shown = shop.text("show", "nightly")
    resumed = shop.json("resume", "nightly")

    assert mine["reason"] == f"paused by {getpass.getuser()}"
    assert hers["reason"] == again["reason"] == "paused by alice"
    assert begin <= datetime.fromisoformat(hers["paused_at"]) <= shop.at.database.now()
    assert hers["paused_at"] == again["paused_at"]
    assert "paused by alice" in shown
    assert (resumed["reason"], resumed["paused_at"]) == (None, None)


def test_name_that_several_tasks_share_is_refused_with_their_ids(shop: Shop) -> None:
    """Nothing is paused; an id works."""
    first, second = shop.task("twin"), shop.task("twin")

    done = shop.command("pause", "twin")

    assert done.exit_code == 1
    assert first.id is not None
    assert second.id is not None
    assert first.id in done.stderr
    assert second.id in done.stderr
    assert shop.json("pause", first.id)["state"] == "paused"
    assert shop.json("show", second.id)["state"] == "active"


def test_cancelled_task_cannot_be_resumed(shop: Shop) -> None:
    """Cancelling ends a Task and its unfinished runs for good."""
    task = shop.task()
    waiting = shop.run(RunState.WAITING, schedule_id=task.id)

    assert shop.text("cancel", "nightly") == "nightly is cancelled\n"
    done = shop.command("resume", "nightly")

    assert (done.exit_code, shop.json("show", waiting)["state"]) == (1, "cancelled")
    assert "is cancelled" in done.stderr


def test_next_lists_the_next_instants(shop: Shop) -> None:
    """So many as asked for; of a paused Task those that it would have."""
    shop.task()

    found = [datetime.fromisoformat(instant) for instant in shop.json("next", "nightly", "-n", "3")["next_runs"]]
    shop.text("pause", "nightly")
    paused = shop.command("next", "nightly", "-n", "2")

    assert [instant - found[0] for instant in found] == [timedelta(days=days) for days in range(3)]
    assert all((instant.hour, instant.minute) == (0, 0) for instant in found)
    assert len(paused.stdout.splitlines()) == 2
    assert paused.stderr == "nightly is paused: it would run\n"


# -- backfill


def test_backfill_opens_the_runs_that_a_dry_run_names(shop: Shop) -> None:
    """Once; the second time there is nothing left to do."""
    task = shop.task()
    window = ("--from", "2026-03-02T00:00+00:00", "--to", "2026-03-04T12:00+00:00")

    planned = shop.json("backfill", "nightly", *window, "--dry-run")
    told = shop.text("backfill", "nightly", *window, "--dry-run")
    assert shop.json("runs") == []
    done = shop.json("backfill", str(task.id), *window)

    days = [f"2026-03-0{day}T00:00:00+00:00" for day in (2, 3, 4)]
    assert (planned["count"], planned["instants"], planned["dry_run"]) == (3, days, True)
    assert told.endswith("\n3 runs of nightly would be opened\n")
    assert len(told.splitlines()) == 4
    assert [run["scheduled_for"] for run in done["runs"]] == days
    assert done["runs"][0]["reason"].startswith("backfill 2026-03-02T00:00:00+00:00 to ")
    assert shop.text("backfill", "nightly", *window) == "0 runs of nightly are opened\n"
    assert "backfilled" in shop.text("show", done["runs"][0]["id"])


def test_backfill_says_what_it_cannot_do(shop: Shop) -> None:
    """Exit code 1 and how many runs there would be; 2 for an instant that cannot be read; now is the default end."""
    shop.task(schedule="* * * * *")

    many = shop.command("backfill", "nightly", "--from", "1d")
    unread = shop.command("backfill", "nightly", "--from", "yesterday")
    nobody = shop.command("backfill", "nobody", "--from", "1d")

    assert (many.exit_code, unread.exit_code, nobody.exit_code) == (1, 2, 1)
    assert "limit=1000: expected at least 1,44" in many.stderr
    assert len(shop.json("backfill", "nightly", "--from", "10m", "--limit", "20")["runs"]) in {10, 11}


# -- runs and show


def test_runs_are_newest_first_and_limited(shop: Shop) -> None:
    """The latest are what one looks for."""
    now = shop.at.database.now()
    ids = [shop.run(created_at=now - timedelta(seconds=ago)) for ago in (30, 20, 10)]

    assert [run["id"] for run in shop.json("runs")] == ids[::-1]
    assert [run["id"] for run in shop.json("runs", "--limit", "1")] == ids[-1:]


def test_runs_are_filtered(shop: Shop) -> None:
    """By state, task function, schedule and age."""
    task, now = shop.task(), shop.at.database.now()
    old = shop.run(created_at=now - timedelta(hours=3))
    failed = shop.run(RunState.FAILED)
    of_task = shop.run(schedule_id=task.id)
    other = shop.run(func_name="report")

    def ids(*arguments: str) -> set[str]:
        return {run["id"] for run in shop.json("runs", *arguments)}

    assert ids("--state", "failed") == {failed}
    assert ids("--func", "report") == {other}
    assert ids("--schedule", "nightly") == ids("--schedule", str(task.id)) == {of_task}
    assert ids("--since", "2h") == {failed, of_task, other}
    assert ids("--since", (now - timedelta(hours=4)).isoformat()) == {old, failed, of_task, other}


def test_table_of_runs_has_waits_times_and_reasons(shop: Shop) -> None:
    """Seconds as people say them; a reason of several lines stays in one row."""
    created = shop.at.database.now() - timedelta(minutes=10)
    started = created + timedelta(seconds=1.5)
    shop.run(
        RunState.FAILED, created_at=created, started_at=started, run_seconds=125.0, attempts=4, reason="no\nsuch page"
    )

    head, row, *_ = shop.text("runs").splitlines()

    assert "1.5 s  2 min 5 s" in row
    assert row.endswith("4  no such page")
    assert row.index("failed") == head.index("STATE")


def test_wide_characters_keep_the_columns_aligned(shop: Shop) -> None:
    """A Chinese character takes two places on a terminal."""
    shop.task("每日报告")
    shop.task("nightly")

    _, *lines = shop.text("schedules").splitlines()[:3]

    wide = next(line for line in lines if "每日报告" in line)
    narrow = next(line for line in lines if "nightly" in line)
    assert wide.index("active") + 4 == narrow.index("active")


def test_show_has_everything_about_a_run(shop: Shop) -> None:
    """Arguments, attempts, worker, what it used, error and traceback."""
    run_id = shop.run(
        RunState.FAILED, attempts=3, losses=1, max_retries=2, worker="w@host", cpu_seconds=0.25, peak_memory=64 * 2**20,
        error="ValueError: no", traceback="Traceback:\n  line 1\n", args="[7]",
    )  # fmt: skip

    text, document = shop.text("show", run_id), shop.json("show", run_id)

    assert "3 ended of at most 3, 1 lost with their worker\n" in text
    for part in ("0.250 s", "64.0 MiB", "w@host", "ValueError: no", "\n    Traceback:\n      line 1\n"):
        assert part in text
    assert (document["kind"], document["args"], document["kwargs"]) == ("run", [7], {"x": 1})
    assert document["traceback"] == "Traceback:\n  line 1\n"


def test_show_has_a_task_and_its_latest_runs(shop: Shop) -> None:
    """By name or id."""
    task = shop.task()
    run_id = shop.run(schedule_id=task.id)

    text, document = shop.text("show", "nightly"), shop.json("show", str(task.id))

    assert "0 0 * * * (UTC)" in text
    assert run_id in text
    assert (document["kind"], [run["id"] for run in document["runs"]]) == ("task", [run_id])


def test_show_asks_celery_for_what_the_ledger_does_not_know(shop: Shop) -> None:
    """A result that Celery has is shown; an id that nobody knows is not found."""
    known, unknown = "00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b"
    shop.at.app.backend.store_result(known, 3, "SUCCESS")

    assert shop.json("show", known)["state"] == "succeeded"
    assert shop.command("show", unknown).exit_code == 1


# -- run and cancel


def test_function_is_run_with_params(shop: Shop) -> None:
    """Recorded with the function's own priority before it is sent."""
    sent = shop.json("run", "add", "--params", '{"x": 5}')

    assert (sent["func_name"], sent["kwargs"], sent["priority"]) == ("add", {"x": 5}, 2)
    assert shop.json("show", sent["id"])["state"] == "queued"


def test_task_is_run_now_by_its_name(shop: Shop) -> None:
    """In whatever state it is; its schedule does not move."""
    task = shop.task().pause_sync()

    sent = shop.json("run", "nightly")

    assert (sent["schedule_id"], sent["scheduled_for"], sent["kwargs"]) == (task.id, None, {"x": 1})
    assert Task.get_sync("nightly").state is ScheduleState.PAUSED


def test_params_are_for_functions(shop: Shop) -> None:
    """A Task has its own, so that giving some is a mistake; where a function has its name the function is run."""
    shop.task("nightly")
    shop.task("add")

    refused = shop.command("run", "nightly", "--params", '{"x": 9}')
    sent = shop.json("run", "add", "--params", '{"x": 9}')

    assert refused.exit_code == 1
    assert "has its own params" in refused.stderr
    assert (sent["schedule_id"], sent["kwargs"]) == (None, {"x": 9})
    assert shop.json("run", "add")["schedule_id"] is not None


def test_run_is_cancelled_once(shop: Shop) -> None:
    """A run that has ended cannot be cancelled."""
    run_id = shop.run(RunState.QUEUED)

    assert shop.text("cancel", run_id) == f"run {run_id} is cancelled\n"
    again = shop.command("cancel", run_id)

    assert again.exit_code == 1
    assert "has ended already: it is cancelled" in again.stderr


def test_running_run_is_asked_to_end(shop: Shop) -> None:
    """Its worker ends it; until then it is running."""
    run_id = shop.run(RunState.RUNNING, owner="somebody", heartbeat_at=shop.at.database.now())

    assert shop.text("cancel", run_id) == f"run {run_id} is running: its worker was asked to cancel it\n"


def test_run_that_is_not_known_yet_does_not_start_when_it_comes(shop: Shop) -> None:
    """What looks like a run's id is remembered; anything else is a mistake."""
    coming = "00000000-0000-4000-8000-0000000000ff"

    assert "not known yet" in shop.text("cancel", coming)
    assert shop.json("show", coming)["state"] == "cancelled"


# -- purge and migrate


def test_purge_deletes_old_finished_runs_only(shop: Shop) -> None:
    """Live and undelivered ones stay, young ones too; --dry-run deletes nothing."""
    long_ago = shop.at.database.now() - timedelta(days=10)
    shop.run(created_at=long_ago, ended_at=long_ago)
    kept = {
        shop.run(),
        shop.run(RunState.QUEUED, created_at=long_ago),
        shop.run(created_at=long_ago, ended_at=long_ago, delivered=False),
    }

    dry = shop.text("purge", "--older-than", "1w", "--dry-run")
    assert dry.startswith("1 run that ended before ")
    assert len(shop.json("runs")) == 4

    assert shop.json("purge", "--older-than", "1w", "--yes")["deleted"] == 1
    assert {run["id"] for run in shop.json("runs")} == kept


def test_purge_is_limited_to_a_function_and_keeps_30_days(shop: Shop) -> None:
    """The default age is the setting's."""
    now = shop.at.database.now()
    for func_name, days in (("add", 31), ("report", 31), ("report", 29)):
        shop.run(func_name=func_name, ended_at=now - timedelta(days=days))

    assert shop.text("purge", "--func", "report", "--yes") == "deleted 1 run\n"
    assert shop.text("purge", "--yes") == "deleted 1 run\n"
    assert shop.text("purge").endswith("nothing to delete\n")


def test_purge_in_a_script_needs_yes(shop: Shop) -> None:
    """Nobody is there to be asked: nothing is deleted."""
    shop.run()

    done = shop.command("purge", "--older-than", "0s")

    assert done.exit_code == 2
    assert "--yes" in done.stderr
    assert len(shop.json("runs")) == 1


def test_migrate_says_from_which_version_to_which(shop: Shop) -> None:
    """Up again after everything was dropped; going back needs to be confirmed."""
    newest = shop.json("migrate")["to"]

    refused = shop.command("migrate", "--to", "base")
    down = shop.json("migrate", "--to", "base", "--yes")
    up = shop.json("migrate")

    assert refused.exit_code == 2
    assert (down["from"], down["to"]) == (newest, None)
    assert (up["from"], up["to"]) == (None, newest)
    assert shop.text("migrate").endswith(f"already at schema version {newest}\n")


def test_unknown_schema_version_is_a_usage_error(shop: Shop) -> None:
    """The known ones are named."""
    done = shop.command("migrate", "--to", "9999")

    assert done.exit_code == 2
    assert "'9999': expected head, base or one of 0001, 0002, 0003, 0004, 0005" in done.stderr


# -- as programs


def in_terminal(argv: list[str], columns: int, **how: Any) -> str:
    """What a program shows on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    environ = {**how.pop("env"), "COLUMNS": str(columns), "TERM": "xterm"}
    environ.pop("NO_COLOR", None)
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, **how)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:
        pass  # EIO: the program has closed the terminal
    os.close(ours)
    assert process.wait(60) == 0, seen
    return seen.decode()


@pytest.fixture
def environ(shop: Shop) -> dict[str, str]:
    """The environment of a process beside this one."""
    return {**os.environ, "PYTHONPATH": f"{shop.folder}{os.pathsep}{REPOSITORY}", "NO_COLOR": "1"}


@pytest.mark.parametrize("program", [[PROGRAM], [sys.executable, "-m", "celery", "llmtasks"]])
def test_both_programs_do_the_same(shop: Shop, environ: dict[str, str], program: list[str]) -> None:
    """``llmtasks ...`` and ``celery llmtasks ...`` find the same app and its ledger."""
    run_id = shop.run()

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        argv = [*program, *arguments]
        return subprocess.run(argv, cwd=shop.folder, env=environ, capture_output=True, text=True, timeout=60)

    listed, missing = call("runs", "--json"), call("show", "nobody")

    assert [run["id"] for run in json.loads(listed.stdout)] == [run_id], listed.stderr
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("Error: no Task has the id or name 'nobody'")


def test_app_is_named_as_for_celery(shop: Shop, environ: dict[str, str]) -> None:
    """``llmtasks -A module`` works on that module's app and its settings."""
    (shop.folder / "shop.py").write_text(
        "import celery\napp = celery.Celery('shop', broker='memory://')\n"
        f"app.conf.llmtasks_database_url = 'sqlite:///{shop.folder}/other.db'\n"
    )

    argv = [PROGRAM, "-A", "shop", "migrate", "--json"]
    done = subprocess.run(argv, cwd=shop.folder, env=environ, capture_output=True, text=True, timeout=60)

    assert json.loads(done.stdout)["database"] == f"sqlite:///{shop.folder}/other.db", done.stderr


def test_table_fits_the_terminal_and_has_colours_there(shop: Shop, environ: dict[str, str]) -> None:
    """Reasons are cut to the terminal's width; ids never are. Elsewhere nothing is cut or coloured."""
    run_id = shop.run(RunState.FAILED, reason="a very long reason " * 20)

    seen = in_terminal([PROGRAM, "runs"], 120, cwd=shop.folder, env=environ)
    row = next(line for line in seen.splitlines() if run_id in line)

    assert "\x1b[31mfailed\x1b[0m" in row
    assert row.rstrip().endswith("...")
    assert len(row.replace("\x1b[31m", "").replace("\x1b[0m", "").rstrip()) <= 120
    assert "\x1b" not in shop.text("runs")
    assert "a very long reason " * 19 in shop.text("runs")


def test_import_of_the_command_line_needs_no_flower() -> None:
    """Each command's own module is imported when it is used."""
    code = "import sys; sys.modules['flower'] = None; import llmtasks.cli; print('llmtasks.cli.dev' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == "False\n"
