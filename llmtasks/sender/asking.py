"""What the broker and the workers say when they are asked; nobody is waited for longer than some seconds."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import celery

from llmtasks.errors import BrokerUnavailableError
from llmtasks.sender.publishing import CONNECT_TIMEOUT, celery_state, gone, outage
from llmtasks.sender.rabbitmq import is_rabbitmq_transport

#: Seconds that a Redis server or a result backend may take for one answer.
ANSWER_TIMEOUT: Final = 5
#: Seconds without a further answer after which workers count as silent.
WORKER_TIMEOUT: Final = 1.5
#: Settings that say which serializers are used and accepted, and what their entries call pickle.
_SERIALIZERS: Final = (
    "accept_content", "result_accept_content", "task_serializer", "result_serializer", "event_serializer",
)  # fmt: skip
_PICKLE: Final = frozenset({"pickle", "application/x-python-serialize"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisServer:
    """How a Redis or Valkey server keeps what it is given; None where it does not say."""

    policy: str | None
    #: Bytes; 0 is no limit.
    max_memory: int | None
    append_only: bool | None
    #: When it writes snapshots, as its setting ``save`` says; empty is never.
    save: str | None


@contextmanager
def answering(app: celery.Celery) -> Generator[Any]:
    """A connection to the broker for the block alone, which gives up within seconds.

    Raises:
        BrokerUnavailableError: The broker does not answer, or stops to.
    """
    options: dict[str, Any] = {}
    if is_redis_transport(app):
        options = {"socket_connect_timeout": CONNECT_TIMEOUT, "socket_timeout": ANSWER_TIMEOUT}
    elif is_rabbitmq_transport(app):
        options = {"read_timeout": ANSWER_TIMEOUT, "write_timeout": ANSWER_TIMEOUT}
    away: tuple[type[Exception], ...] = (*gone(app), OSError)
    with app.connection_for_write(transport_options=options) as connection:
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=CONNECT_TIMEOUT)
            yield connection
        except away as error:
            raise outage(app, error) from error


def is_redis_transport(app: celery.Celery) -> bool:
    """Whether messages go through Redis or Valkey, by kombu's own transport or one made from it."""
    return str(_transport_of(app).driver_type) == "redis"


def stock_visibility(app: celery.Celery) -> float | None:
    """Seconds after which kombu's own Redis transport hands an unacknowledged message out again.

    Returns:
        None on every other transport, also on those made from it, which may refresh what they hold.
    """
    if not is_redis_transport(app):
        return None
    with app.connection_for_write() as connection:
        transport: Any = connection.transport
    # Ours gives a connection kombu's own channels where the settings ask for that.
    known = type(transport).__module__.startswith(("kombu.", "llmtasks."))
    if not known or not transport.Channel.__module__.startswith("kombu."):
        return None
    options: Mapping[str, Any] = app.conf.broker_transport_options or {}
    return float(options.get("visibility_timeout", transport.Channel.visibility_timeout))


def redis_server(app: celery.Celery) -> RedisServer | None:
    """How the broker keeps messages; None where it is no Redis.

    Raises:
        BrokerUnavailableError: The broker does not answer.
    """
    if not is_redis_transport(app):
        return None
    said: dict[str, Any] = {}
    with answering(app) as connection:
        client = connection.default_channel.client
        # A hosted Redis may refuse either.
        with suppress(*connection.channel_errors):
            said |= {**client.info("memory"), **client.info("persistence")}
        with suppress(*connection.channel_errors):
            said |= client.config_get("save")
    memory, appends = said.get("maxmemory"), said.get("aof_enabled")
    return RedisServer(
        policy=said.get("maxmemory_policy"),
        max_memory=None if memory is None else int(memory),
        append_only=None if appends is None else bool(int(appends)),
        save=said.get("save"),
    )


def consumed_queues(app: celery.Celery, workers: Sequence[str]) -> dict[str, frozenset[str]]:
    """The queues that workers consume, by the worker's name; without those that did not answer in time.

    Raises:
        BrokerUnavailableError: The broker does not answer.
    """
    if not workers:
        return {}
    with answering(app) as connection:
        inspect = app.control.inspect(destination=list(workers), timeout=WORKER_TIMEOUT, connection=connection)
        found: Any = inspect.active_queues()
    return {name: frozenset(item["name"] for item in queues) for name, queues in (found or {}).items()}


def celery_state_soon(app: celery.Celery, run_id: str) -> str:
    """The state that Celery's result backend has for an id, given up after seconds; its own limits are minutes.

    Raises:
        BrokerUnavailableError: The result backend does not answer.
    """
    answers: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(celery_state(app, run_id))
        except Exception as error:
            answers.put(error)
        backend: Any = app.backend
        with suppress(AttributeError):  # this thread's own; a backend without a server has none
            backend.client.connection_pool.disconnect()

    threading.Thread(target=ask, name="llmtasks-asks-celery", daemon=True).start()
    try:
        found = answers.get(timeout=ANSWER_TIMEOUT)
    except queue.Empty:
        raise BrokerUnavailableError(f"the result backend does not answer within {ANSWER_TIMEOUT} s") from None
    if isinstance(found, Exception):
        raise found
    return found


def queue_of(app: celery.Celery, func_name: str, queue: str | None = None) -> str:
    """The queue of a run: its own, else where messages of its function go, else Celery's default."""
    if queue is not None:
        return queue
    task: Any = app.tasks.get(func_name)
    own = getattr(getattr(task, "options", None), "queue", None)
    route = app.amqp.router.route({"queue": own} if own else {}, func_name, (), {}, task_type=task)
    found = route.get("queue") or app.conf.task_default_queue  # None where an exchange decides
    return str(getattr(found, "name", found))


def pickle_settings(app: celery.Celery) -> dict[str, Any]:
    """The settings that use or accept pickle, with their values."""
    found: dict[str, Any] = {}
    for name in _SERIALIZERS:
        value: Any = app.conf.get(name)
        entries = [value] if isinstance(value, str) else list(value or ())
        if _PICKLE & {str(entry) for entry in entries}:
            found[name] = value
    return found


def _transport_of(app: celery.Celery) -> Any:
    return app.connection_for_write().get_transport_cls()
