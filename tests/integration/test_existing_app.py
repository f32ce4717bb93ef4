"""llmtasks in a Celery app that exists: install(app) adds what is missing and leaves the rest alone."""

from collections.abc import Iterator

import pytest

from llmtasks.states import RunState
from tests.ledger import QUICK, Ledger, sqlite_url
from tests.processes import CeleryProcess, Project
from tests.servers import Valkey, valkey
from tests.waiting import wait_until

APP = """
    import os
    import celery
    import llmtasks
    from tests.notebook import note

    app = celery.Celery("shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_BROKER"])
    app.conf.update(
        worker_prefetch_multiplier=3,
        task_default_queue="shop",
        beat_schedule={"old entry": {"task": "shop.old", "schedule": 1.0, "args": ("entry",)}},
    )
    llmtasks.install(app)


    @app.on_after_configure.connect
    def add_entries(sender, **_):
        sender.add_periodic_task(1.0, old.s("added"), name="added entry")


    @app.task(name="shop.old")
    def old(name):
        note("old", name)
        return name


    @llmtasks.task_registry.register(name="new", max_retries=1, retry_delay=0)
    async def new(x):
        note("new", x)
        return x * 2


    @llmtasks.task_registry.register(name="often", interval_minutes=1 / 60, max_retries=0)
    async def often():
        note("often")
"""

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with valkey(tmp_path_factory.mktemp("existing") / "broker", unix=True) as broker:
        yield broker


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, broker: Valkey) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("existing")
    project = Project(folder / "project", broker=broker, database_url=sqlite_url(folder), celeryconfig="")
    (project.folder / "celeryconfig.py").unlink()
    project.environ.update(QUICK, SHOP_BROKER=broker.url)
    for name in ("LLMTASKS_BROKER_URL", "LLMTASKS_RESULT_URL", "LLMTASKS_IMPORTS"):
        del project.environ[name]
    project.write("shop.py", APP)
    yield project
    project.close()


@pytest.fixture(scope="module")
def worker(project: Project) -> CeleryProcess:
    argv = ["-A", "shop", "worker", "-l", "INFO", "-n", "shop@test", "-c", "2", "--without-gossip", "--without-mingle"]
    return project.celery(*argv, ready="shop@test ready.", name="worker")


def test_settings_of_the_app_win_and_missing_ones_are_added(project: Project) -> None:
    """What the app set stays; what it did not set is what registered functions need."""
    shown = project.python(
        """
        from shop import app
        conf = app.conf
        print(conf.worker_prefetch_multiplier, conf.task_default_queue)
        print(conf.beat_scheduler, conf.worker_send_task_events)
        print(conf.broker_transport_options["priority_steps"], conf.broker_url == conf.result_backend)
        """
    )

    assert shown.splitlines() == ["3 shop", "llmtasks True", f"{list(range(10))} True"]


@pytest.mark.usefixtures("worker")
def test_old_and_new_tasks_run_side_by_side(project: Project) -> None:
    """An unregistered task runs as ever; a registered one is in the ledger, under the app's name."""
    shown = project.python(
        """
        from shop import new, old
        from llmtasks.dispatch import find_run, station
        from llmtasks.errors import RunNotFoundError

        sent = new.delay(21)
        print(old.delay("by hand").get(timeout=50), sent.get(timeout=50))
        run = find_run(station(), sent.id)
        print(run.state, run.queue, station().name)
        """
    )

    assert shown.splitlines()[0] == "by hand 42"
    assert shown.splitlines()[1].split()[1:] == ["shop", "shop"]


@pytest.mark.usefixtures("worker")
def test_entries_of_the_app_become_schedules(project: Project) -> None:
    """beat_schedule, add_periodic_task and registered intervals side by side; old tasks' runs end as published."""
    beat = project.celery("-A", "shop", "beat", "-l", "INFO", ready="beat: Starting...", name="beat")
    ledger = Ledger(project)

    wait_until(lambda: {"entry", "added"} <= set(ledger.notes_now("old")), 60, "both entries ran")
    ledger.notes("often", 1)
    beat.terminate()

    shown = project.python(
        """
        from shop import app
        from llmtasks import Task
        from llmtasks.dispatch import station
        from llmtasks.store import runs

        for task in Task.list_sync():
            print(task.name, task.func_name, task.state)
        with station().database.reading() as connection:
            for run in runs.find(connection, station().name, func_name="shop.old", limit=1):
                print(run.state, run.reason, run.delivered)
        """
    )
    lines = shown.splitlines()
    assert "old entry shop.old active" in lines
    assert "added entry shop.old active" in lines
    assert "often often active" in lines
    assert lines[-1] == f"{RunState.SKIPPED} handed to Celery True"


@pytest.mark.usefixtures("worker")
def test_urgent_runs_of_an_existing_app_come_first(project: Project) -> None:
    """Priorities are translated for the app's own transport."""
    shown = project.python(
        """
        from shop import app, new
        from llmtasks import sender

        print([sender.native_priority(app, number) for number in (1, 5, 10)])
        """
    )

    assert shown == "[0, 4, 9]\n"


def test_configuration_that_is_read_later_wins(project: Project) -> None:
    """install(app) before config_from_object, as in Django projects, forces nothing and overrides nothing."""
    shown = project.python(
        """
        import celery, llmtasks

        class Settings:
            CELERY_BROKER_URL = "redis://localhost:1/0"
            CELERY_WORKER_PREFETCH_MULTIPLIER = 7
            CELERY_BROKER_TRANSPORT_OPTIONS = {"visibility_timeout": 9}

        app = llmtasks.install(celery.Celery("later"))
        assert not app.configured
        app.config_from_object(Settings, namespace="CELERY")
        conf = app.conf
        print(conf.worker_prefetch_multiplier, conf.broker_transport_options["visibility_timeout"], conf.beat_scheduler)
        print(len(conf.broker_transport_options["priority_steps"]), conf.broker_url)
        """
    )

    assert shown.splitlines() == ["7 9 llmtasks", "10 redis://localhost:1/0"]
