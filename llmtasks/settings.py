"""Settings, read once from the Celery app's configuration and the environment.

A setting ``llmtasks_<name>`` of the app wins over the environment variable ``LLMTASKS_<NAME>``, which wins over the
default.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from llmtasks.errors import ConfigurationError, InvalidOptionError, nearest
from llmtasks.redis_options import EXPLICIT, REDIS_OPTIONS, is_redis, redis_spelling, transport_options

T = TypeVar("T")

#: Linux refuses a unix socket path of 108 bytes or more, macOS one of 104 (``sun_path``).
SOCKET_PATH_LIMIT: Final = 103
#: What runs at once where ``max_workers`` is ``"auto"``: processes or threads, and coroutines.
AUTO_WORKERS: Final = 4
AUTO_COROUTINES: Final = 1000
#: The pool of coroutines, as Celery's ``worker_pool`` names it.
ASYNCIO_POOL: Final = "llmtasks.worker.pool:AsyncioPool"
#: Values of LLMTASKS_POOL, and what Celery calls them.
POOLS: Final[dict[str, str]] = {
    "asyncio": ASYNCIO_POOL,
    "prefork": "prefork",
    "threads": "threads",
    "solo": "solo",
    "custom": "custom",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDefaults:
    """What a task function gets where its registration says nothing (``TASK_CONFIG``).

    Attributes:
        max_workers: How many runs a worker executes at once; ``"auto"`` is 4, and 1,000 on the asyncio pool.
        default_timeout: Seconds that one attempt may take.
        max_retries: Attempts after the first.
        retry_delay: Seconds between attempts.
    """

    max_workers: int | str = "auto"
    default_timeout: float = 3600
    max_retries: int = 3
    retry_delay: float = 300

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> TaskDefaults:
        """Check a ``TASK_CONFIG`` mapping.

        Raises:
            InvalidOptionError: A key is unknown or a value is out of range.
        """
        known = [item.name for item in fields(cls)]
        for key in config:
            if key not in known:
                near = nearest(str(key), known)
                hint = f"Did you mean {near[0]!r}?" if near else ""
                raise InvalidOptionError("TASK_CONFIG", key, f"only the keys {', '.join(known)}", hint)
        workers = config.get("max_workers", "auto")
        if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise InvalidOptionError("TASK_CONFIG['max_workers']", workers, 'a whole number from 1, or "auto"')
        _number(config, "default_timeout", above=0)
        _number(config, "retry_delay", least=0)
        retries = config.get("max_retries", 0)
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise InvalidOptionError("TASK_CONFIG['max_retries']", retries, "a whole number from 0")
        return cls(**config)

    def concurrency(self, pool: str) -> int:
        """``max_workers`` as a number, for what Celery's ``worker_pool`` is."""
        if isinstance(self.max_workers, str):
            return AUTO_COROUTINES if pool == ASYNCIO_POOL else AUTO_WORKERS
        return self.max_workers


def worker_pool(named: str) -> str:
    """Celery's ``worker_pool`` for a name of `POOLS`.

    Raises:
        InvalidOptionError: There is no such pool.
    """
    if named not in POOLS:
        raise InvalidOptionError("LLMTASKS_POOL", named, " or ".join(map(repr, POOLS)))
    return POOLS[named]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set, with its default. Durations are in seconds.

    Attributes:
        app: The name under which schedules and runs of this application are kept apart from others in one database.
        home: The data directory (SQLite file, embedded broker); ``None`` where nothing needs it.
        database_url: SQLAlchemy URL of the schedules and the ledger.
        broker_url: Celery's broker.
        result_url: Celery's result backend.
        redis_transport: ``llmtasks``, or ``stock`` for kombu's own; where the broker is Redis or Valkey.
        timezone: Celery's ``timezone`` if the app sets one: the default zone of cron expressions.
        tasks: Defaults of task functions.
        heartbeat: How often a worker stamps the runs it holds.
        lease: A run whose stamp is older than this is lost.
        cancel_poll: How often a worker looks for cancel requests of what it runs.
        outbox_patience: A message unpublished for this long is taken over by any keeper.
        keep_runs_days: Finished runs are kept this many days.
        keep_bytes: Arguments and results of a delivered run are cut to this many characters each.
        shutdown_grace: After SIGTERM a worker lets its runs go on for this long, then puts them back.
        loop_warning: A worker whose event loop has been blocked for this long says what blocks it (asyncio pool).
        loop_limit: A worker whose event loop has been blocked for this long ends at once; 0 is never.
    """

    app: str
    home: Path | None
    database_url: str
    broker_url: str
    result_url: str
    redis_transport: str = "llmtasks"
    timezone: str | None = None
    tasks: TaskDefaults = field(default_factory=TaskDefaults)
    heartbeat: float = 3.0
    lease: float = 12.0
    cancel_poll: float = 0.5
    outbox_patience: float = 3.0
    keep_runs_days: float = 30.0
    keep_bytes: int = 10_000
    shutdown_grace: float = 20.0
    loop_warning: float = 1.0
    loop_limit: float = 0.0

    @property
    def lease_time(self) -> timedelta:
        """``lease`` as a timedelta."""
        return timedelta(seconds=self.lease)

    @property
    def transport_options(self) -> dict[str, Any]:
        """Celery's ``broker_transport_options`` for this broker."""
        return transport_options(self.broker_url, self.redis_transport)


def read(conf: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings of the app whose configuration is ``conf``.

    Args:
        conf: Celery's ``app.conf`` or any mapping; ``None`` reads the environment alone.
        environ: The environment; defaults to the process's.

    Raises:
        ConfigurationError: A value is wrong, or the data directory is needed and nothing says where it is.
    """
    conf = {} if conf is None else conf
    environ = os.environ if environ is None else environ

    def get(name: str, kind: Callable[[Any], T], default: T) -> T:
        source, value = _find(conf, environ, name)
        if value is None:
            return default
        try:
            return kind(value)
        except (TypeError, ValueError):
            raise InvalidOptionError(source, value, f"a {kind.__name__}") from None

    home_value = get("home", str, "")
    home = Path(home_value).expanduser().absolute() if home_value else _home_beside_configuration()

    def in_home(what: str) -> Path:
        if home is None:
            raise ConfigurationError(
                f"no {what} is set and there is no celeryconfig.py beside which to keep data: set LLMTASKS_HOME to a "
                "directory, or both LLMTASKS_DATABASE_URL and LLMTASKS_BROKER_URL"
            )
        return home

    database_url = get("database_url", str, "") or f"sqlite:///{in_home('database') / 'llmtasks.db'}"
    broker_url = (
        # Celery lets this variable, which `celery -b` sets too, win over every configuration.
        environ.get("CELERY_BROKER_URL")
        or get("broker_url", str, "")
        or str(conf.get("broker_url") or "")
        or embedded_broker_url(in_home("broker"))
    )
    result_url = (
        get("result_url", str, "") or str(conf.get("result_backend") or "") or _result_url(broker_url, database_url)
    )
    settings = Settings(
        app=get("app", str, "") or str(conf.get("main") or "") or "llmtasks",
        home=home,
        database_url=_with_driver(database_url),
        broker_url=redis_spelling(broker_url),
        result_url=redis_spelling(result_url),
        redis_transport=redis_transport(conf, environ),
        timezone=conf.get("timezone"),
        tasks=TaskDefaults.read(conf.get("TASK_CONFIG") or {}),
        heartbeat=get("heartbeat", float, 3.0),
        lease=get("lease", float, 12.0),
        cancel_poll=get("cancel_poll", float, 0.5),
        outbox_patience=get("outbox_patience", float, 3.0),
        keep_runs_days=get("keep_runs_days", float, 30.0),
        keep_bytes=get("keep_bytes", int, 10_000),
        shutdown_grace=get("shutdown_grace", float, 20.0),
        loop_warning=get("loop_warning", float, 1.0),
        loop_limit=get("loop_limit", float, 0.0),
    )
    if settings.lease < 2 * settings.heartbeat:
        raise InvalidOptionError(
            "LLMTASKS_LEASE", settings.lease, f"at least twice the heartbeat of {settings.heartbeat} s"
        )
    return settings


def redis_transport(conf: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> str:
    """The setting of that name alone: reading it needs no data directory."""
    source, value = _find({} if conf is None else conf, os.environ if environ is None else environ, "redis_transport")
    if value is not None and value not in REDIS_OPTIONS:
        raise InvalidOptionError(source, value, " or ".join(map(repr, REDIS_OPTIONS)))
    return "llmtasks" if value is None else str(value)


def socket_path(home: Path) -> Path:
    """Where the embedded broker of data directory ``home`` listens.

    Inside the directory if the path is short enough for a unix socket, else in the user's runtime directory or the
    system's temporary one, under a name made from the directory's.
    """
    beside = home / "broker.sock"
    if len(os.fsencode(beside)) <= SOCKET_PATH_LIMIT:
        return beside
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    runtime = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(runtime) / f"llmtasks-{os.getuid()}-{digest}" / "broker.sock"


def embedded_broker_url(home: Path) -> str:
    """The URL of the embedded broker of data directory ``home``."""
    return f"redis+socket://{quote(str(socket_path(home)))}"


def _result_url(broker_url: str, database_url: str) -> str:
    """The broker itself where it can keep results (pushed, not polled), else the database."""
    return broker_url.removeprefix(f"{EXPLICIT}+") if is_redis(broker_url) else f"db+{database_url}"


def _find(conf: Mapping[str, Any], environ: Mapping[str, str], name: str) -> tuple[str, Any]:
    """Where a setting was found, and its value; None where it is not set."""
    value = conf.get(f"llmtasks_{name}")
    if value is not None:
        return f"llmtasks_{name}", value
    variable = f"LLMTASKS_{name.upper()}"
    return variable, environ.get(variable) or None


def _with_driver(url: str) -> str:
    """``postgresql://`` means psycopg 3 and ``mysql://`` PyMySQL: the drivers that our extras install."""
    scheme, separator, rest = url.partition("://")
    driver = {
        "postgresql": "postgresql+psycopg",
        "postgres": "postgresql+psycopg",
        "mysql": "mysql+pymysql",
        "mariadb": "mysql+pymysql",
    }
    return driver.get(scheme, scheme) + separator + rest


def _home_beside_configuration() -> Path | None:
    """``.llmtasks/`` beside the module that configures Celery, or None where there is no such module."""
    name = os.environ.get("CELERY_CONFIG_MODULE") or "celeryconfig"
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        file = found.origin if found else None
    return Path(file).absolute().parent / ".llmtasks" if file else None


def _number(config: Mapping[str, Any], key: str, *, above: float | None = None, least: float | None = None) -> None:
    value = config.get(key, 1)
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if above is not None and (not good or value <= above):
        raise InvalidOptionError(f"TASK_CONFIG[{key!r}]", value, f"seconds above {above}")
    if least is not None and (not good or value < least):
        raise InvalidOptionError(f"TASK_CONFIG[{key!r}]", value, f"seconds from {least}")
