"""doctor where servers or processes are missing, and where the configuration is wrong."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import kombu.transport
import pytest
from celery import Celery
from kombu.transport.redis import Transport

from llmtasks import doctor
from llmtasks.dispatch import Station, station
from llmtasks.doctor import Check, Patient, Severity, configuration, examine
from llmtasks.doctor.finding import Finding
from llmtasks.errors import RunNotFoundError
from llmtasks.sender import asking
from llmtasks.store import processes, rows
from llmtasks.store.database import Database
from llmtasks.store.processes import Process
from llmtasks.task import Task
from llmtasks.why import explain
from tests.commandline import app_with, command, document
from tests.ledger import QUICK
from tests.processes import REPOSITORY, Project
from tests.servers import DatabaseServer, PostgreSQL, Valkey, free_port
from tests.waiting import wait_until

TASKS = """
from llmtasks.registry import task_registry

@task_registry.register(name="video", timeout=7200)
async def video(): ...
"""


class RefreshingTransport(Transport):  # type: ignore[misc]  # kombu has no types
    """A Redis transport of somebody's own, which may refresh what its workers hold."""


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    with app_with(tmp_path, TASKS) as app:
        yield app


def found_by(name: str, at: Station) -> list[Finding]:
    """What one check finds."""
    (check,) = [check for check in doctor.CHECKS if check.name == name]
    return list(check.ask(Patient(at)))


def alive(at: Station, kind: str, **changes: Any) -> None:
    """A row as a process writes it that lives."""
    now = at.database.now()
    process = Process(
        id=f"a/{kind}", app=at.name, kind=kind, name=f"{kind}@host", pid=1, pool="prefork", concurrency=1,
        started_at=now, heartbeat_at=now + timedelta(hours=1), cpu_percent=0.0, memory=0,
        functions=("video", "llmtasks.purge"), **changes,
    )  # fmt: skip
    with at.database.transaction() as tx:
        processes.stamp(tx, process)


# -- processes


def test_missing_processes_are_found(app: Celery) -> None:
    """No worker is an error; no beat is one as soon as a schedule waits for it."""
    before = {item["code"]: item["severity"] for item in document("doctor", exit_code=1)["findings"]}
    Task(func_name="video", interval_minutes=5).save_sync()
    after = {item["code"]: item["severity"] for item in document("doctor", exit_code=1)["findings"]}

    assert (before["no-worker"], before["no-beat"]) == ("error", "warning")
    assert (after["no-worker"], after["no-beat"]) == ("error", "error")


def test_processes_that_fell_silent_do_not_count(app: Celery) -> None:
    """One lease after its last heartbeat nobody is alive."""
    at = station(app)
    alive(at, "worker")
    assert found_by("no-worker", at) == []

    with at.database.transaction() as tx:
        tx.execute(rows.processes.update().values(heartbeat_at=at.database.now() - timedelta(seconds=60)))

    assert [item.code for item in found_by("no-worker", at)] == ["no-worker"]


# -- servers


def test_broker_that_is_away_is_found_at_once(tmp_path: Path) -> None:
    """What asks it is not run, and that is no fault of the checks; nothing waits for it for long."""
    with app_with(tmp_path, TASKS, LLMTASKS_BROKER_URL=f"redis://127.0.0.1:{free_port()}/0"):
        began = time.monotonic()
        report = document("doctor", exit_code=1)
        took = time.monotonic() - began

    (found,) = [item for item in report["findings"] if item["code"] == "broker-unreachable"]
    assert found["severity"] == "error"
    assert "does not answer" in found["found"]
    assert {item["check"]: item["reason"] for item in report["not_run"]} == dict.fromkeys(
        ["redis-eviction", "redis-persistence", "cannot-interrupt", "queue-without-consumer"],
        "the broker cannot be asked",
    )
    assert took < 30


def test_broker_that_takes_the_connection_and_says_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that hangs holds up neither command."""
    monkeypatch.setattr(asking, "ANSWER_TIMEOUT", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(9)
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        with app_with(tmp_path, TASKS, LLMTASKS_BROKER_URL=url) as app:
            app.conf.result_backend = url
            began = time.monotonic()
            (found,) = found_by("broker", station(app))
            with pytest.raises(RunNotFoundError, match="Celery cannot be asked: the result backend does not answer"):
                explain(station(app), "00000000-0000-4000-8000-000000000001")
            took = time.monotonic() - began

    assert found.code == "broker-unreachable"
    assert took < 20


def test_missing_socket_of_the_embedded_broker_says_what_to_type(tmp_path: Path) -> None:
    """The finding names the command that starts it."""
    with app_with(tmp_path, TASKS, LLMTASKS_BROKER_URL=f"redis+socket://{tmp_path}/broker.sock") as app:
        (found,) = found_by("broker", station(app))

    assert "start it with `llmtasks broker`" in found.found


def test_database_that_is_away_is_found(tmp_path: Path) -> None:
    """Once: what reads it is not run."""
    url = f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"
    with app_with(tmp_path, TASKS, LLMTASKS_DATABASE_URL=url):
        report = document("doctor", exit_code=1)

    assert [item["code"] for item in report["findings"] if item["severity"] == "error"] == ["database-unreachable"]
    assert {"no-beat", "no-worker", "clock-skew", "end-untold"} <= {item["check"] for item in report["not_run"]}
    assert not any(item["failed"] for item in report["not_run"])


def test_outdated_tables_are_found(tmp_path: Path, database_server: DatabaseServer) -> None:
    """With the command that makes them; afterwards they are in order."""
    url = database_server.create_database()
    with app_with(tmp_path, TASKS, LLMTASKS_DATABASE_URL=url) as app:
        (found,) = found_by("database", station(app))
        migrated = command("migrate")
        again = found_by("database", station(app))
    database_server.drop_database(url)

    assert (found.code, found.severity, found.fix) == ("schema-outdated", Severity.ERROR, "celery llmtasks migrate")
    assert found.found.startswith("the database has schema version none, this llmtasks needs ")
    assert (migrated.exit_code, again) == (0, [])


def test_file_that_is_no_database_is_found(tmp_path: Path) -> None:
    """With what to set instead."""
    (tmp_path / "letter.db").write_text("Dear all, " * 400)
    with app_with(tmp_path, TASKS, LLMTASKS_DATABASE_URL=f"sqlite:///{tmp_path / 'letter.db'}") as app:
        (found,) = found_by("database", station(app))

    assert found.code == "database-unusable"
    assert "letter.db is not a SQLite file" in found.found


@pytest.mark.postgresql
@pytest.mark.redis
def test_clock_that_differs_from_the_databases_is_found(
    tmp_path: Path, postgresql_server: PostgreSQL, broker: Valkey
) -> None:
    """This host's, and that of each process, which say so themselves. The database's own clock is moved here."""
    url = postgresql_server.create_database()
    database = Database(url)
    database.migrate()
    with database.transaction() as tx:
        tx.exec_driver_sql(
            "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS "
            "$$ SELECT pg_catalog.clock_timestamp() + interval '90 seconds' $$"
        )
        name = url.rsplit("/", 1)[1]
        tx.exec_driver_sql(f"ALTER DATABASE {name} SET search_path = public, pg_catalog")
    database.close()
    project = Project(tmp_path / "project", broker=broker, database_url=url)
    project.environ.update(QUICK)
    try:
        project.worker()
        at = station(project.app)
        wait_until(lambda: Patient(at).workers, 60, "the worker's row")
        (found,) = found_by("clock-skew", at)
    finally:
        project.close()
        postgresql_server.drop_database(url)

    assert (found.code, found.severity) == ("clock-skew", Severity.WARNING)
    assert "this host is 90.0 s behind, worker-1@test is 90.0 s behind" in found.found


def test_clocks_that_agree_are_in_order(app: Celery) -> None:
    """Some tenths of a second do no harm."""
    at = station(app)
    alive(at, "worker", clock_offset=-0.4)
    alive(at, "beat", clock_offset=1.9)

    assert found_by("clock-skew", at) == []


# -- configuration


def test_pickle_is_found_wherever_it_is_accepted(app: Celery) -> None:
    """In the content that is accepted, and in what is written; JSON alone is in order."""
    at = station(app)
    assert found_by("pickle-accepted", at) == []

    app.conf.accept_content = {"json", "application/x-python-serialize"}
    app.conf.result_serializer = "pickle"
    accepted, written = found_by("pickle-accepted", at)

    assert accepted.severity is Severity.ERROR
    assert accepted.found.startswith("accept_content is {")
    assert accepted.fix == "set accept_content = ['json']"
    assert (written.found, written.fix) == ("result_serializer is 'pickle'", "set result_serializer = 'json'")


def test_visibility_timeout_below_a_functions_timeout_is_found(tmp_path: Path) -> None:
    """Celery's default of an hour is not enough for two; a longer one, and one on another transport, is in order."""
    with app_with(tmp_path, TASKS, LLMTASKS_BROKER_URL="redis://localhost/0") as app:
        at = station(app)
        (unset,) = found_by("visibility-timeout", at)
        app.conf.broker_transport_options = {"visibility_timeout": 7300}
        enough = found_by("visibility-timeout", at)
        app.conf.broker_transport_options = {"visibility_timeout": 7200}
        (short,) = found_by("visibility-timeout", at)

    assert (unset.code, unset.severity) == ("visibility-timeout", Severity.ERROR)
    assert unset.found == "visibility_timeout is 3600 s, and 'video' may run for 7230 s (2 h)"
    assert enough == []
    assert short.found.startswith("visibility_timeout is 7200 s, ")


def test_visibility_timeout_of_other_transports_is_their_own_affair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transport made from kombu's may refresh what it holds, and memory forgets it."""
    monkeypatch.setitem(kombu.transport.TRANSPORT_ALIASES, "refreshing", f"{__name__}:RefreshingTransport")
    for url in ("refreshing+redis://localhost/0", "memory://"):
        with app_with(tmp_path, TASKS, LLMTASKS_BROKER_URL=url) as app:
            app.conf.broker_transport_options = {"visibility_timeout": 12}
            if url != "memory://":
                assert app.connection_for_write().get_transport_cls() is RefreshingTransport
            assert found_by("visibility-timeout", station(app)) == []


def test_transport_without_priorities_is_found(tmp_path: Path) -> None:
    """A note, or a warning where a function has a priority; Redis has them."""
    prior = TASKS.replace("timeout=7200", "priority=1")
    with app_with(tmp_path, TASKS) as app:
        (note,) = found_by("transport-without-priorities", station(app))
    with app_with(tmp_path, prior) as app:
        (warning,) = found_by("transport-without-priorities", station(app))
    with app_with(tmp_path, prior, LLMTASKS_BROKER_URL="redis://localhost/0") as app:
        assert found_by("transport-without-priorities", station(app)) == []

    assert (note.severity, note.found) == (Severity.NOTE, "the broker's transport is 'memory'")
    assert warning.severity is Severity.WARNING
    assert warning.found == "the broker's transport is 'memory', and video has a priority"


def test_sqlite_file_on_a_network_file_system_is_found(app: Celery, tmp_path: Path) -> None:
    """By what the kernel has mounted where; a local disk is in order, and so is a system without such a table."""
    patient, mounts = Patient(station(app)), tmp_path / "mounts"

    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nnas:/data {tmp_path} nfs4 rw 0 0\n")
    (found,) = configuration.sqlite_on_network(patient, mounts)
    mounts.write_text(f"nas:/ / nfs4 rw 0 0\n/dev/sda {tmp_path} ext4 rw 0 0\n")

    assert (found.code, found.severity) == ("sqlite-on-network", Severity.ERROR)
    assert found.found.endswith("llmtasks.db is on a file system of type nfs4")
    assert list(configuration.sqlite_on_network(patient, mounts)) == []
    assert list(configuration.sqlite_on_network(patient, tmp_path / "none")) == []


def test_file_system_is_that_of_the_nearest_mount() -> None:
    """Not of one whose name begins alike; spaces in names are octal there; the later of two is on top."""
    mounts = (
        "/dev/a / ext4 rw 0 0\nnas:/x /data nfs rw 0 0\n/dev/b /data/fast xfs rw 0 0\n"
        "nas:/y /my\\040data cifs rw 0 0\n/dev/c /twice ext4 rw 0 0\nnas:/z /twice 9p rw 0 0\nbroken\n"
    )
    kinds = {
        path: configuration.file_system_of(Path(path), mounts)
        for path in ("/srv/x.db", "/data/x.db", "/database/x.db", "/data/fast/x.db", "/my data/x.db", "/twice/x.db")
    }

    assert list(kinds.values()) == ["ext4", "nfs", "ext4", "xfs", "cifs", "9p"]


# -- what cannot be examined


def test_app_that_cannot_be_loaded_is_exit_code_2(tmp_path: Path) -> None:
    """One line on stderr, whatever its modules raise."""
    with app_with(tmp_path, TASKS):
        wrong_name = command("-A", "no_such_module", "doctor")
        (tmp_path / "tasks.py").write_text("1 / 0")
        sys.modules.pop("tasks")
        broken = command("doctor")

    assert (wrong_name.exit_code, wrong_name.stdout) == (2, "")
    assert wrong_name.stderr.startswith("Error: --app='no_such_module'")
    assert (broken.exit_code, broken.stdout) == (2, "")
    assert broken.stderr == "Error: the app's modules cannot be imported: ZeroDivisionError: division by zero\n"


def test_check_that_breaks_is_exit_code_2_unless_there_are_findings(app: Celery) -> None:
    """The others are asked, and what it says is shown."""
    at = station(app)
    with at.database.transaction() as tx:
        tx.exec_driver_sql("DROP TABLE llmtasks_schedules")
    alone = command("doctor")
    app.conf.accept_content = ["json", "pickle"]
    beside_findings = command("doctor")

    assert (alone.exit_code, beside_findings.exit_code) == (2, 1)
    first, rest, counts = alone.stdout.splitlines()[-3:]
    assert first.startswith("not run: no-beat: ")
    assert first.endswith("no such table: llmtasks_schedules")
    assert rest.startswith("not run: no-worker, clock-skew, ")
    assert counts == "0 errors, 0 warnings, 1 note; 7 checks found nothing"


def test_fault_in_a_check_hides_no_other(app: Celery) -> None:
    """What needs it is not run."""

    def broken(_patient: Patient) -> Iterator[Finding]:
        raise RuntimeError("a fault")

    def fine(_patient: Patient) -> Iterator[Finding]:
        yield from ()

    report = examine(
        station(app),
        checks=[
            Check(name="broken", ask=broken),
            Check(name="after", ask=fine, needs=("broken",)),
            Check(name="fine", ask=fine),
        ],
    )

    assert report.passed == ("fine",)
    assert [(item.check, item.reason, item.failed) for item in report.not_run] == [
        ("broken", "RuntimeError: a fault", True),
        ("after", "the broken cannot be asked", False),
    ]


def test_progress_is_shown_on_a_terminal_only(app: Celery, tmp_path: Path) -> None:
    """On stderr, and wiped out in the end; stdout has the findings alone."""
    ours, theirs = os.openpty()
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    argv = [sys.executable, "-m", "celery", "llmtasks", "doctor", "--json"]
    process = subprocess.Popen(argv, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    stdout, _ = process.communicate(timeout=60)
    shown = os.read(ours, 65536).decode()
    os.close(ours)

    assert "\rchecking clock-skew" in shown
    assert shown.endswith(" \r")
    assert stdout.startswith(b"{\n")
