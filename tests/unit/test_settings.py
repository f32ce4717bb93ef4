"""Settings: the app's configuration wins over the environment, which wins over the defaults; mistakes are named."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from llmtasks.errors import ConfigurationError, InvalidOptionError
from llmtasks.rabbitmq_options import RABBITMQ_OPTIONS
from llmtasks.redis_options import REDIS_OPTIONS, is_redis
from llmtasks.settings import TaskDefaults, read, redis_transport, socket_path, worker_pool

URLS = {"LLMTASKS_DATABASE_URL": "sqlite:////data/x.db", "LLMTASKS_BROKER_URL": "redis://host/0"}


def test_defaults_need_a_place_or_two_urls(tmp_path: Path) -> None:
    """A data directory is enough: database, broker and results follow from it."""
    settings = read({}, {"LLMTASKS_HOME": str(tmp_path)})

    assert settings.home == tmp_path
    assert settings.database_url == f"sqlite:///{tmp_path / 'llmtasks.db'}"
    assert settings.broker_url == f"redis+socket://{socket_path(tmp_path)}"
    assert settings.result_url == settings.broker_url
    assert (settings.app, settings.lease, settings.heartbeat, settings.keep_runs_days) == ("llmtasks", 12, 3, 30)
    assert settings.lease_time == timedelta(seconds=12)
    assert settings.tasks == TaskDefaults()


def test_without_a_place_the_missing_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to set."""
    monkeypatch.setenv("CELERY_CONFIG_MODULE", "no_such_module_anywhere")

    with pytest.raises(ConfigurationError, match=r"no database is set .* set LLMTASKS_HOME"):
        read({}, {})
    with pytest.raises(ConfigurationError, match="no broker is set"):
        read({}, {"LLMTASKS_DATABASE_URL": "sqlite:////x.db"})
    assert read({}, URLS).home is None


def test_home_is_beside_the_module_that_configures_celery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a process is started, the data is in one place."""
    (tmp_path / "my_celery_configuration.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CELERY_CONFIG_MODULE", "my_celery_configuration")

    assert read({}, {}).home == tmp_path / ".llmtasks"


def test_home_may_be_relative_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept as an absolute path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")

    assert read({}, {"LLMTASKS_HOME": "data"}).home == tmp_path / "data"
    assert read({}, {"LLMTASKS_HOME": "~/data"}).home == Path("/home/me/data")


def test_configuration_wins_over_the_environment() -> None:
    """And the environment over the default."""
    environ = {**URLS, "LLMTASKS_APP": "shop", "LLMTASKS_LEASE": "30", "LLMTASKS_KEEP_BYTES": ""}

    settings = read({"llmtasks_lease": 40, "main": "ignored"}, environ)

    assert (settings.app, settings.lease, settings.keep_bytes) == ("shop", 40.0, 10_000)
    assert read({"main": "mine"}, URLS).app == "mine"


def test_broker_and_results_of_the_app_are_taken_over() -> None:
    """What the app has set for Celery is what llmtasks uses, unless its own setting says otherwise."""
    conf = {"broker_url": "amqp://host", "result_backend": "redis://other", "timezone": "Asia/Tokyo"}
    environ = {"LLMTASKS_DATABASE_URL": "sqlite:////x.db"}

    settings = read(conf, environ)

    assert (settings.broker_url, settings.result_url, settings.timezone) == (
        "amqp://host",
        "redis://other",
        "Asia/Tokyo",
    )
    assert read(conf, {**environ, "LLMTASKS_BROKER_URL": "redis://mine"}).broker_url == "redis://mine"
    assert read(conf, {**environ, "LLMTASKS_RESULT_URL": "redis://mine"}).result_url == "redis://mine"


@pytest.mark.parametrize(
    ("broker", "results"),
    [
        ("redis://h/1", "redis://h/1"),
        ("valkeys://h", "rediss://h"),
        ("llmtasks+redis+socket:///x.sock", "redis+socket:///x.sock"),
        ("redis+socket:///x.sock", "redis+socket:///x.sock"),
        ("amqp://h", "db+sqlite:////data/x.db"),
    ],
)
def test_results_are_kept_in_the_broker_where_it_can(broker: str, results: str) -> None:
    """Else in the database."""
    assert read({}, {**URLS, "LLMTASKS_BROKER_URL": broker}).result_url == results


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgresql://me@h/x", "postgresql+psycopg://me@h/x"),
        ("postgres://me@h/x", "postgresql+psycopg://me@h/x"),
        ("postgresql+psycopg2://me@h/x", "postgresql+psycopg2://me@h/x"),
        ("mysql://me@h/x", "mysql+pymysql://me@h/x"),
        ("mariadb://me@h/x", "mysql+pymysql://me@h/x"),
        ("sqlite:////x.db", "sqlite:////x.db"),
    ],
)
def test_driver_of_a_plain_url_is_the_one_that_we_install(given: str, used: str) -> None:
    """A driver that is named is kept."""
    assert read({}, {**URLS, "LLMTASKS_DATABASE_URL": given}).database_url == used


@pytest.mark.parametrize(
    ("name", "value"),
    [("LLMTASKS_LEASE", "soon"), ("LLMTASKS_KEEP_BYTES", "1.5"), ("LLMTASKS_HEARTBEAT", "x")],
)
def test_unreadable_number_is_named(name: str, value: str) -> None:
    """With the variable, what it holds, and what was expected."""
    with pytest.raises(InvalidOptionError, match=f"{name}='{value}': expected "):
        read({}, {**URLS, name: value})


def test_lease_leaves_room_for_a_missed_heartbeat() -> None:
    """A lease of one heartbeat would lose every run that stamps a little late."""
    with pytest.raises(InvalidOptionError, match=r"LLMTASKS_LEASE=5\.0: expected at least twice the heartbeat of 3\.0"):
        read({}, {**URLS, "LLMTASKS_LEASE": "5"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_retry": 1}, "TASK_CONFIG='max_retry': expected only the keys .* Did you mean 'max_retries'"),
        ({"zzz": 1}, "TASK_CONFIG='zzz': expected only the keys"),
        ({"max_workers": 0}, r"TASK_CONFIG\['max_workers'\]=0: expected a whole number from 1, or \"auto\""),
        ({"max_workers": True}, "max_workers"),
        ({"max_workers": "many"}, "max_workers"),
        ({"default_timeout": 0}, "default_timeout.*=0: expected seconds above 0"),
        ({"default_timeout": "60"}, "default_timeout"),
        ({"retry_delay": -1}, "retry_delay.*=-1: expected seconds from 0"),
        ({"max_retries": -1}, "max_retries.*=-1: expected a whole number from 0"),
        ({"max_retries": 1.5}, "max_retries"),
        ({"max_retries": True}, "max_retries"),
    ],
)
def test_bad_task_config_is_refused(config: dict[str, Any], message: str) -> None:
    """The key, the value and what was expected."""
    with pytest.raises(InvalidOptionError, match=message):
        read({"TASK_CONFIG": config}, URLS)


def test_task_config_sets_the_defaults() -> None:
    """Concurrency is a number even where it is left to us."""
    config = {"max_workers": 2, "default_timeout": 60, "max_retries": 0, "retry_delay": 0.5}

    defaults = read({"TASK_CONFIG": config}, URLS).tasks

    assert (defaults.concurrency("prefork"), defaults.default_timeout, defaults.max_retries, defaults.retry_delay) == (
        2,
        60,
        0,
        0.5,
    )
    assert TaskDefaults().concurrency("prefork") == 4
    assert TaskDefaults().concurrency(worker_pool("asyncio")) == 1000


def test_unknown_pool_is_named() -> None:
    """The error says what was given and which pools there are."""
    with pytest.raises(InvalidOptionError, match=r"LLMTASKS_POOL='gevent': expected 'asyncio' or 'prefork'"):
        worker_pool("gevent")


def test_socket_of_a_deep_directory_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses long paths; the name still belongs to that directory alone."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    short, deep, deeper = Path("/data"), Path("/" + "d" * 120), Path("/" + "d" * 121)

    assert socket_path(short) == Path("/data/broker.sock")
    assert str(socket_path(deep)).startswith("/run/user/7/llmtasks-")
    assert socket_path(deep) != socket_path(deeper)
    assert socket_path(deep) == socket_path(deep)


@pytest.mark.parametrize(("url", "answer"), [("rediss://h", True), ("valkey+x://h", True), ("amqp://redis", False)])
def test_redis_is_told_by_the_scheme(url: str, answer: bool) -> None:
    """Valkey speaks the same protocol."""
    assert is_redis(url) is answer


def test_redis_transport_is_one_of_two() -> None:
    """Ours unless somebody says otherwise; Celery's configuration wins; anything else is refused by name."""
    assert redis_transport({}, {}) == "llmtasks"
    assert redis_transport({}, {"LLMTASKS_REDIS_TRANSPORT": "stock"}) == "stock"
    assert (
        redis_transport({"llmtasks_redis_transport": "llmtasks"}, {"LLMTASKS_REDIS_TRANSPORT": "stock"}) == "llmtasks"
    )
    with pytest.raises(InvalidOptionError, match="LLMTASKS_REDIS_TRANSPORT='fast': expected 'llmtasks' or 'stock'"):
        read({}, {**URLS, "LLMTASKS_REDIS_TRANSPORT": "fast"})


@pytest.mark.parametrize(
    ("broker", "kind"),
    [
        ("redis://h", "llmtasks"),
        ("valkey+socket:///x", "llmtasks"),
        ("llmtasks+rediss://h", "llmtasks"),
        ("sentinel://h", "stock"),
        ("redis+cluster://h", "stock"),
        ("amqps://h", "rabbitmq"),
        ("memory://", None),
    ],
)
def test_transport_options_follow_the_broker(broker: str, kind: str | None) -> None:
    """Those of our transport, of stock kombu where only that will do, of RabbitMQ, and none for anything else."""
    found = read({}, {**URLS, "LLMTASKS_BROKER_URL": broker}).transport_options

    assert found == ({**REDIS_OPTIONS, "rabbitmq": RABBITMQ_OPTIONS}[kind] if kind else {})


def test_valkey_is_written_as_redis() -> None:
    """Celery's result backends and Flower know no other spelling."""
    assert read({}, {**URLS, "LLMTASKS_BROKER_URL": "valkeys://h/1"}).broker_url == "rediss://h/1"
