"""``llmtasks.install(app)`` gives an existing app what it has not set; celeryconfig.py gives the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtasks.install import DEFAULTS
from llmtasks.redis_options import REDIS_OPTIONS
from tests.processes import REPOSITORY

#: Each case configures an app around ``install`` in its own way and shows settings.
CASES = {
    "nothing set": "app = Celery('shop'); install(app)",
    "set before": "app = Celery('shop', broker='redis://own'); app.conf.beat_scheduler = 'own'; install(app)",
    "set after": "app = Celery('shop'); install(app); app.conf.update(beat_scheduler='own', broker_url='redis://own')",
    "object after": "app = Celery('shop'); install(app); app.config_from_object(Own)",
    "used before": "app = Celery('shop', broker='redis://own'); app.conf.timezone; install(app)",
    "twice": "app = Celery('shop', broker='redis://own'); install(app); install(app)",
    "options": "app = Celery('shop', broker='redis://own'); "
    "app.conf.broker_transport_options = {'visibility_timeout': 60, 'max_connections': 5}; install(app)",
    "rabbitmq": "app = Celery('shop', broker='amqp://own'); install(app)",
    "quorum": "app = Celery('shop', broker='amqp://own'); app.conf.task_default_queue_type = 'quorum'; install(app)",
    "quorum among others": "from kombu import Queue; app = Celery('shop', broker='amqp://own'); "
    "app.conf.task_queues = [Queue('a'), Queue('b', queue_arguments={'x-queue-type': 'quorum'})]; install(app)",
    "task config": "app = Celery('shop', broker='redis://own'); "
    "app.conf.TASK_CONFIG = {'max_workers': 7}; install(app)",
}
CODE = """
import json
from celery import Celery
from llmtasks import install

class Own:
    beat_scheduler = "own"
    broker_url = "redis://own"

CASE
names = ["broker_url", "result_backend", "beat_scheduler", "worker_prefetch_multiplier", "broker_transport_options",
         "worker_concurrency", "task_acks_late", "task_serializer", "task_queue_max_priority"]
print(json.dumps({name: getattr(app.conf, name) for name in names}))
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case ends with, each in a process of its own, all at once."""
    folder = tmp_path_factory.mktemp("install")
    environ = {"LLMTASKS_BROKER_URL": "redis://theirs", "LLMTASKS_RESULT_URL": "redis://results"}
    environ |= {"LLMTASKS_DATABASE_URL": f"sqlite:///{folder}/ledger.db", "PATH": "/usr/bin:/bin"}
    environ |= {"PYTHONPATH": str(REPOSITORY)}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", CODE.replace("CASE", case)],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, case in CASES.items()
    }
    printed = {name: process.communicate(timeout=120)[0] for name, process in started.items()}
    return {name: json.loads(text) for name, text in printed.items()}


def test_an_app_without_settings_gets_ours(settings: dict[str, dict[str, Any]]) -> None:
    """The broker of the environment, our scheduler, the options that priorities and long runs need."""
    found = settings["nothing set"]

    assert (found["broker_url"], found["result_backend"]) == ("redis://theirs", "redis://results")
    assert found["beat_scheduler"] == "llmtasks"
    assert found["worker_prefetch_multiplier"] == 1
    assert found["broker_transport_options"] == REDIS_OPTIONS["llmtasks"]


@pytest.mark.parametrize("case", ["set before", "set after", "object after"])
def test_the_apps_own_settings_stay(settings: dict[str, dict[str, Any]], case: str) -> None:
    """Whenever they are set."""
    found = settings[case]

    assert (found["broker_url"], found["beat_scheduler"]) == ("redis://own", "own")
    assert found["worker_prefetch_multiplier"] == 1


@pytest.mark.parametrize("case", ["used before", "twice"])
def test_installing_late_or_twice_is_the_same(settings: dict[str, dict[str, Any]], case: str) -> None:
    """An app whose configuration was read already, and one that is installed by two modules."""
    found = settings[case]

    assert found["beat_scheduler"] == "llmtasks"
    assert found["broker_url"] == "redis://own"
    assert found["result_backend"] is None


def test_transport_options_are_added_to_the_apps_own(settings: dict[str, dict[str, Any]]) -> None:
    """Its own win; RabbitMQ gets none of Redis, and confirms what it is sent."""
    own = settings["options"]["broker_transport_options"]

    assert own == {**REDIS_OPTIONS["llmtasks"], "visibility_timeout": 60, "max_connections": 5}
    assert settings["rabbitmq"]["broker_transport_options"] == {"confirm_publish": True}


def test_quorum_queues_get_no_priorities(settings: dict[str, dict[str, Any]]) -> None:
    """RabbitMQ refuses a quorum queue with ``x-max-priority``; every other app gets our ten."""
    found = {case: of["task_queue_max_priority"] for case, of in settings.items()}

    assert (found["quorum"], found["quorum among others"]) == (None, None)
    assert found["rabbitmq"] == found["nothing set"] == 9


def test_settings_of_plain_tasks_stay_as_they_are(settings: dict[str, dict[str, Any]]) -> None:
    """What would change how the app's own tasks are acknowledged or serialized is not touched."""
    for found in settings.values():
        assert (found["task_acks_late"], found["task_serializer"]) == (False, "json")
    assert settings["task config"]["worker_concurrency"] == 7


def test_celeryconfig_sets_what_install_sets(tmp_path: Path) -> None:
    """Plain ``celery worker`` from the project's root and an existing app behave the same."""
    code = """
    import json, celeryconfig
    print(json.dumps({name: value for name, value in vars(celeryconfig).items() if name.islower() and name[0] != "_"},
                     default=str))
    """
    environ = {"PYTHONPATH": str(REPOSITORY), "LLMTASKS_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)

    assert {name: found.get(name) for name in DEFAULTS} == DEFAULTS
    assert found["broker_transport_options"] == REDIS_OPTIONS["llmtasks"]
    assert found["broker_url"] == f"redis+socket://{tmp_path}/broker.sock"
