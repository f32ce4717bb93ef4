"""doctor on a project that works: it finds nothing there, and each trouble that a test makes."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from sqlalchemy import delete

from llmtasks.dispatch import station
from llmtasks.doctor import CHECKS
from llmtasks.states import RunState
from llmtasks.store import processes, rows, schedules
from llmtasks.store.database import Database
from llmtasks.store.schedules import Schedule
from llmtasks.task import Task
from tests.commandline import command, document
from tests.conftest import DATABASES, parameters
from tests.ledger import QUICK
from tests.processes import Project
from tests.servers import Valkey, valkey
from tests.waiting import wait_until

pytestmark = [pytest.mark.redis, pytest.mark.slow]

TASKS = """
    from llmtasks.registry import task_registry

    @task_registry.register(name="mail", interval_minutes=60, timeout=60)
    def mail():
        ...

    @task_registry.register(name="index", timeout=60, queue="quick")
    async def index():
        ...
"""


@pytest.fixture(scope="module", params=parameters(DATABASES))
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project in order: a prefork worker, a threads worker with a queue of its own, a beat."""
    folder = tmp_path_factory.mktemp("doctor")
    server = None if request.param == "sqlite" else request.getfixturevalue(f"{request.param}_server")
    url = f"sqlite:///{folder / 'project' / 'llmtasks.db'}" if server is None else server.create_database()
    with valkey(folder / "broker", unix=True) as broker:
        project = Project(folder / "project", broker=broker, database_url=url)
        project.environ.update(QUICK)
        project.tasks(TASKS)
        database = Database(url)
        database.migrate()
        database.close()
        try:
            project.worker(pool="prefork")
            project.worker("-Q", "quick", pool="threads")
            project.beat()
            at = station(project.app)

            def stored() -> bool:
                with at.database.reading() as connection:
                    alive = processes.alive(connection, at.name, at.database.now() - at.settings.lease_time)
                    return len(alive) == 3 and schedules.next_due(connection, at.name) is not None

            wait_until(stored, 60, "two workers and a beat with its schedules")
            yield project
        finally:
            project.close()
            if server is not None:
                server.drop_database(url)


def findings(*arguments: str, exit_code: int = 0) -> dict[str, dict[str, str]]:
    """What doctor finds, by code."""
    return {item["code"]: item for item in document("doctor", *arguments, exit_code=exit_code)["findings"]}


@contextmanager
def row(project: Project, **values: Any) -> Iterator[Schedule]:
    """A schedule that is in the database for the block, as no code of today would write it."""
    at = station(project.app)
    given: dict[str, Any] = {
        "id": "00000000-0000-4000-8000-000000000001", "app": at.name, "name": "broken", "func_name": "mail",
        "kind": "interval", "every_us": 60_000_000, "anchor": at.database.now(),
    }  # fmt: skip
    with at.database.transaction() as tx:
        stored = schedules.put(tx, Schedule(**{**given, **values}), at.database.now())
    yield stored
    with at.database.transaction() as tx:
        tx.execute(delete(rows.schedules).where(rows.schedules.c.id == stored.id))


@contextmanager
def run(project: Project, **values: Any) -> Iterator[str]:
    """A run that is in the ledger for the block."""
    at = station(project.app)
    now = at.database.now()
    given: dict[str, Any] = {
        "id": "00000000-0000-4000-8000-000000000002", "app": at.name, "func_name": "mail", "name": "mail",
        "state": RunState.QUEUED, "priority": 5, "created_at": now, "published_at": now, "delivered": False,
    }  # fmt: skip
    with at.database.transaction() as tx:
        tx.execute(rows.runs.insert().values({**given, **values}))
    yield given["id"]
    with at.database.transaction() as tx:
        tx.execute(delete(rows.runs).where(rows.runs.c.id == given["id"]))


@contextmanager
def configured(broker: Valkey, **settings: str) -> Iterator[redis.Redis]:
    """A broker with other settings for the block."""
    with redis.Redis(unix_socket_path=broker.socket) as client:
        names = [name.replace("_", "-") for name in settings]
        before = {name: client.config_get(name)[name] for name in names}
        for name, value in zip(names, settings.values(), strict=True):
            client.config_set(name, value)
        yield client
        for name, value in before.items():
            client.config_set(name, value)


def test_project_in_order_has_no_findings(project: Project) -> None:
    """Every check runs and finds nothing; the exit code is 0 at either threshold, for both programs."""
    app = project.app
    assert app is not None

    found = document("doctor", "--fail-on", "warning")
    for_people = command("doctor", "--fail-on", "warning")
    program = project.run([sys.executable, "-m", "celery", "llmtasks", "doctor", "--json"])

    assert found == {"findings": [], "passed": [check.name for check in CHECKS], "not_run": []}
    assert for_people.stdout == f"0 errors, 0 warnings, 0 notes; {len(CHECKS)} checks found nothing\n"
    assert for_people.stderr == ""
    assert (program.returncode, json.loads(program.stdout)) == (0, found), program.stderr


def test_finding_says_what_why_and_what_to_do(project: Project) -> None:
    """For people a block of five lines, then the counts; exit code 1."""
    with row(project, reason="set aside: no such zone"):
        done = command("doctor")

    assert done.exit_code == 1
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines()[:5])
    assert [name.strip() for name in lines] == ["severity", "code", "found", "why", "fix"]
    assert done.stdout.splitlines()[-1] == f"1 error, 0 warnings, 0 notes; {len(CHECKS) - 1} checks found nothing"


def test_schedule_that_was_set_aside_is_found(project: Project) -> None:
    """With its reason, and how it goes on."""
    with row(project, reason="set aside: no such zone") as broken:
        (found,) = findings(exit_code=1).values()

    assert (found["code"], found["severity"]) == ("schedule-set-aside", "error")
    assert found["found"] == f"schedule 'broken' ({broken.id}) is active and does not fire: set aside: no such zone"
    assert f"llmtasks resume {broken.id}" in found["fix"]


def test_schedule_whose_function_nobody_knows_is_found(project: Project) -> None:
    """Workers and beats say what they know; a plain task of the app's is for workers alone."""
    far = station(project.app).database.now().replace(year=2999)

    with row(project, func_name="gone", next_run_at=far):
        (ours,) = findings(exit_code=1).values()
    with row(project, func_name="gone", next_run_at=far, handed=True):
        (handed,) = findings(exit_code=1).values()
    with row(project, func_name="celery.backend_cleanup", next_run_at=far, handed=True):
        assert findings() == {}

    assert ours["code"] == handed["code"] == "function-unknown"
    assert "will call 'gone', which no live worker and no live beat knows" in ours["found"]
    assert handed["found"].endswith("will call 'gone', which no live worker knows")


def test_queue_with_runs_and_no_consumer_is_found(project: Project) -> None:
    """Until some worker consumes it."""
    app = project.app
    with run(project, queue="gpu"):
        (found,) = findings(exit_code=1).values()
        app.control.add_consumer("gpu", destination=["worker-1@test"], reply=True, timeout=30)
        consumed = findings()
        app.control.cancel_consumer("gpu", destination=["worker-1@test"], reply=True, timeout=30)

    assert (found["code"], found["severity"]) == ("queue-without-consumer", "error")
    assert found["found"].startswith("queue 'gpu' has 0 messages and 1 run, and no worker that answers consumes it")
    assert consumed == {}


def test_queue_that_a_function_names_is_looked_at(project: Project) -> None:
    """A run without a queue of its own goes to its function's."""
    project.app.control.cancel_consumer("quick", destination=["worker-2@test"], reply=True, timeout=30)
    with run(project, func_name="index"):
        (found,) = findings(exit_code=1).values()
    project.app.control.add_consumer("quick", destination=["worker-2@test"], reply=True, timeout=30)

    assert found["found"].startswith("queue 'quick' has 0 messages and 1 run, ")


def test_queue_with_messages_and_no_consumer_is_found(project: Project) -> None:
    """A queue of a registered function, whoever filled it."""
    app = project.app
    app.control.cancel_consumer("quick", destination=["worker-2@test"], reply=True, timeout=30)
    sent = app.tasks["index"].delay()

    (found,) = findings(exit_code=1).values()
    app.control.add_consumer("quick", destination=["worker-2@test"], reply=True, timeout=30)
    sent.get(timeout=60)

    assert found["code"] == "queue-without-consumer"
    assert found["found"].startswith("queue 'quick' has 1 message and 0 runs, ")
    assert findings() == {}


def test_plain_function_with_a_timeout_on_the_threads_pool_is_found(project: Project) -> None:
    """Where its runs can get there; on prefork, or in a queue of its own, it is in order."""
    app = project.app
    app.control.add_consumer("celery", destination=["worker-2@test"], reply=True, timeout=30)

    (found,) = findings("--fail-on", "warning", exit_code=1).values()
    tolerated = command("doctor")
    app.control.cancel_consumer("celery", destination=["worker-2@test"], reply=True, timeout=30)

    assert (found["code"], found["severity"]) == ("cannot-interrupt", "warning")
    assert found["found"].startswith("worker-2@test has the thread pool and runs mail, a plain function with a timeout")
    assert tolerated.exit_code == 0
    assert findings() == {}


def test_end_that_celery_was_told_in_vain_is_found(project: Project) -> None:
    """When it was sent again and again; the first few times are no trouble."""
    now = station(project.app).database.now()
    ended = {"state": RunState.FAILED, "ended_at": now, "delivery_sent_at": now, "heartbeat_at": now, "owner": "me"}

    with run(project, publications=3, **ended):
        assert findings() == {}
    with run(project, publications=5, **ended) as run_id:
        (found,) = findings("--fail-on", "warning", exit_code=1).values()

    assert (found["code"], found["severity"]) == ("end-untold", "warning")
    assert found["found"] == f"1 run ended, and Celery was told in vain; {run_id} 5 times"


def test_redis_that_evicts_is_found(project: Project) -> None:
    """An error where it can be full, else a warning."""
    assert project.app is not None

    with configured(project.broker, maxmemory_policy="allkeys-lru"):
        (unlimited,) = findings("--fail-on", "warning", exit_code=1).values()
    with configured(project.broker, maxmemory_policy="volatile-ttl", maxmemory="1073741824"):
        (limited,) = findings(exit_code=1).values()
    with configured(project.broker, maxmemory="1073741824"):
        assert findings() == {}

    assert (unlimited["code"], unlimited["severity"]) == ("redis-eviction", "warning")
    assert (limited["code"], limited["severity"]) == ("redis-eviction", "error")
    assert limited["found"] == "the broker's maxmemory-policy is 'volatile-ttl', maxmemory is 1073741824 bytes"


def test_redis_that_keeps_nothing_is_found(project: Project) -> None:
    """Snapshots are enough; one that does not say is a note."""
    assert project.app is not None

    with configured(project.broker, appendonly="no", save="") as client:
        (found,) = findings("--fail-on", "warning", exit_code=1).values()
        client.config_set("save", "900 1")
        with_snapshots = findings()
        client.acl_setuser("default", enabled=True, commands=["-config"])
        try:
            (unsaid,) = findings("--fail-on", "warning").values()
        finally:
            client.acl_setuser("default", enabled=True, commands=["+config"])

    assert (found["code"], found["severity"]) == ("redis-persistence", "warning")
    assert "appendonly yes" in found["fix"]
    assert with_snapshots == {}
    assert (unsaid["code"], unsaid["severity"]) == ("redis-persistence", "note")


def test_functions_of_workers_are_in_their_rows(project: Project) -> None:
    """Once each process has started; the tasks of Celery's own too, which schedules may call."""
    at = station(project.app)

    with at.database.reading() as connection:
        alive = processes.alive(connection, at.name, at.database.now() - at.settings.lease_time)

    known = {process.name.partition("@")[0]: set(process.functions) for process in alive}
    assert {"mail", "index", "llmtasks.purge", "celery.backend_cleanup"} <= known["worker-1"]
    assert known["beat"] == {"mail", "index", "llmtasks.purge"}
    assert all(abs(process.clock_offset or 0.0) < 1 for process in alive)


def test_examination_changes_nothing(project: Project) -> None:
    """The schedules are as they were, and no run was made."""
    assert project.app is not None
    before = [(task.id, task.state, task.next_run_at, task.updated_at) for task in Task.list_sync()]

    assert command("doctor").exit_code == 0

    assert [(task.id, task.state, task.next_run_at, task.updated_at) for task in Task.list_sync()] == before
