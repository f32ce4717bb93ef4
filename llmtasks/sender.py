"""Publish, revoke and read states through Celery; translate priorities; the message as JSON and back."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from weakref import WeakKeyDictionary

import celery
from billiard.exceptions import WorkerLostError
from celery.app import task as celery_task
from celery.canvas import signature
from kombu.exceptions import EncodeError, KombuError
from kombu.utils import json as kombu_json

from llmtasks import settings as settings_module
from llmtasks.errors import BrokerUnavailableError, InvalidParamsError
from llmtasks.options import DEFAULT_PRIORITY
from llmtasks.settings import Settings
from llmtasks.store.outbox import Message

logger = logging.getLogger(__name__)

#: Marks a message that only tells Celery an end which the ledger has already.
DELIVER_HEADER: Final = "llm_deliver"
#: Messages that one round trip to the broker carries at most.
BATCH_SIZE: Final = 200
#: Seconds that one attempt to reach the broker may take.
CONNECT_TIMEOUT: Final = 3
#: Transports whose lowest number comes first, and those whose highest does; the others have no priorities.
_LOW_FIRST: Final = frozenset({"redis"})
_HIGH_FIRST: Final = frozenset({"amqp", "mongodb", "zookeeper"})
#: ``Context.as_execution_options`` names these; what is None is not kept.
_DROPPED_OPTIONS: Final = frozenset({"task_id", "retries", "headers"})

#: Its stub is older than get_actual_ignore_result.
_task_module: Any = celery_task

_settings: WeakKeyDictionary[celery.Celery, Settings] = WeakKeyDictionary()
_transports: WeakKeyDictionary[celery.Celery, str] = WeakKeyDictionary()
_said: set[tuple[str, str]] = set()


def is_handed(message: Message) -> bool:
    """Whether the message is for a plain Celery task of the app's own, of which the ledger hears no more."""
    return bool(message.envelope and message.schedule_id and loads(message.envelope).get("handed"))


def current_app() -> celery.Celery:
    """The Celery app that is current in this thread."""
    proxy: Any = celery.current_app
    app: celery.Celery = proxy._get_current_object()
    return app


def settings_of(app: celery.Celery | None = None) -> Settings:
    """The settings of an app, read at their first use."""
    app = app or current_app()
    found = _settings.get(app)
    if found is None:
        found = _settings[app] = settings_module.read(_Conf(app))
    return found


class _Conf(dict[str, Any]):
    """What Settings reads of an app: its configuration and its name."""

    def __init__(self, app: celery.Celery) -> None:
        super().__init__()
        self._app = app

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, of whichever case the configuration has it."""
        if key == "main":
            return self._app.main
        return self._app.conf.get(key, default)


def dumps(value: Any, what: str) -> str:
    """``value`` as JSON, with Celery's extensions for dates, UUIDs and decimals.

    Raises:
        InvalidParamsError: JSON cannot carry it; the error names the path to the value.
    """
    try:
        return kombu_json.dumps(value)
    except (TypeError, ValueError, EncodeError, RecursionError) as error:
        path, culprit = _culprit(value, what)
        raise InvalidParamsError(
            f"{path} is {culprit!r:.200} of type {type(culprit).__name__}: expected what JSON can carry "
            "(text, numbers, booleans, None, lists, dicts, dates, UUID, Decimal); pass an id or a dict instead"
        ) from error


def loads(text: str) -> Any:
    """What ``dumps`` made a text of."""
    return kombu_json.loads(text)


def ignores_result(task: Any, request: Any) -> bool | None:
    """Whether this run's result is not to be stored: what its message says, else what its task does."""
    found: bool | None = _task_module.get_actual_ignore_result(task, request)
    return found


def native_priority(app: celery.Celery, priority: int | None) -> int | None:
    """A priority of 1 (first) to 10 as the app's transport counts; None where it has none, which is said once."""
    priority = DEFAULT_PRIORITY if priority is None else priority
    transport = _transport(app)
    if transport in _LOW_FIRST:
        return priority - 1
    if transport in _HIGH_FIRST:
        return 10 - priority
    if priority != DEFAULT_PRIORITY and ("priority", transport) not in _said:
        _said.add(("priority", transport))
        logger.warning("the broker's transport %r has no priorities: runs start in the order they were sent", transport)
    return None


def user_priority(app: celery.Celery, native: int | None) -> int:
    """A message's native priority as 1 (first) to 10."""
    transport = _transport(app)
    if native is None or transport not in _LOW_FIRST | _HIGH_FIRST:
        return DEFAULT_PRIORITY
    return min(10, max(1, native + 1 if transport in _LOW_FIRST else 10 - native))


def envelope_of_request(request: Any, ignore_result: bool | None) -> str:
    """What sending the current request's message again needs, arguments aside, as JSON."""
    options = {
        key: value for key, value in request.as_execution_options().items() if value and key not in _DROPPED_OPTIONS
    }
    headers = {key: value for key, value in (request.headers or {}).items() if key != DELIVER_HEADER}
    where = request.delivery_info or {}
    return dumps(
        {
            "options": options,
            "headers": headers,
            "ignore_result": ignore_result,
            "exchange": where.get("exchange") or "",
            "routing_key": where.get("routing_key"),
        },
        "the message",
    )


def envelope_of_options(options: dict[str, Any]) -> str:
    """The same for options of ``apply_async`` that were not published; ``expires`` is absolute already."""
    kept = {
        "link": _list(options.get("link")),
        "link_error": _list(options.get("link_error")),
        **{
            key: options.get(key)
            for key in (
                "chord", "chain", "group_id", "group_index", "root_id", "parent_id", "shadow", "expires", "time_limit",
                "soft_time_limit", "reply_to", "replaced_task_nesting", "stamped_headers",
            )
        },
    }  # fmt: skip
    for stamp in options.get("stamped_headers") or ():
        kept[stamp] = options.get(stamp)
    return dumps(
        {
            "options": {key: value for key, value in kept.items() if value},
            "headers": options.get("headers") or {},
            "ignore_result": options.get("ignore_result"),
            "exchange": options.get("exchange") or "",
            "routing_key": options.get("routing_key"),
            "handed": bool(options.get("handed")),
        },
        "the options",
    )


@dataclass(slots=True)
class _Connection:
    """A thread's own way to the broker."""

    pid: int
    producer: Any


_local = threading.local()


def publish(app: celery.Celery, messages: Sequence[Message]) -> None:
    """Send messages to the broker, many in one round trip where the transport can.

    Raises:
        BrokerUnavailableError: It does not answer. Some messages may have arrived: a copy does no harm, claims drop it.
    """
    held: WeakKeyDictionary[celery.Celery, _Connection] = _local.__dict__.setdefault("held", WeakKeyDictionary())
    mine = held.get(app)
    if mine is None or mine.pid != os.getpid():
        connection = app.connection_for_write()
        mine = held[app] = _Connection(os.getpid(), app.amqp.Producer(connection, auto_declare=False))
    producer = mine.producer
    gone = _errors_of(producer.connection)
    try:
        for start in range(0, len(messages), BATCH_SIZE):
            producer.connection.ensure_connection(max_retries=1, interval_start=0, timeout=CONNECT_TIMEOUT)
            with producer.batch(max_size=BATCH_SIZE):
                for message in messages[start : start + BATCH_SIZE]:
                    _publish_one(app, producer, message)
    except gone as error:
        held.pop(app, None)
        producer.connection.collapse()
        raise BrokerUnavailableError(f"broker {producer.connection.as_uri()} does not answer: {error}") from error


def revoke(app: celery.Celery, run_ids: Iterable[str]) -> None:
    """Tell the workers to drop messages of these runs. Only a courtesy: what counts is in the ledger.

    Raises:
        BrokerUnavailableError: The broker does not answer.
    """
    ids = list(run_ids)
    if not ids:
        return
    with app.connection_for_write() as connection:
        gone = _errors_of(connection)
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=CONNECT_TIMEOUT)
            app.control.revoke(ids, connection=connection)
        except gone as error:
            raise BrokerUnavailableError(f"broker {connection.as_uri()} does not answer: {error}") from error


def celery_state(app: celery.Celery, run_id: str) -> str:
    """The state that Celery's result backend has for an id; PENDING where it knows nothing."""
    state: str = app.AsyncResult(run_id).state
    return state


def queue_length(app: celery.Celery, queue: str) -> int | None:
    """How many messages wait in a queue; None where the transport cannot say."""
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=CONNECT_TIMEOUT)
        try:
            declared: Any = app.amqp.queues[queue].bind(connection.default_channel).queue_declare(passive=True)
        except connection.channel_errors:
            return 0
        except NotImplementedError:
            return None
        return int(declared.message_count)


def default_queue(app: celery.Celery) -> str:
    """The queue of a message that names none."""
    name: str = app.conf.task_default_queue
    return name


def backend_exception(app: celery.Celery, error: Exception) -> str:
    """An error as JSON in the form of Celery's result backends, so that it can be raised again elsewhere."""
    return dumps(app.backend.prepare_exception(error, "json"), "the error")


def lost_failure(app: celery.Celery) -> str:
    """The error of a run whose worker stopped answering, as JSON for ``backend_exception``'s reader."""
    return backend_exception(app, WorkerLostError("the worker that held the run stopped answering"))


def _publish_one(app: celery.Celery, producer: Any, message: Message) -> None:
    """Send one message as ``app.send_task`` would, but subscribe to no result and take no parent from the caller."""
    if message.replacement is not None and not message.delivers:
        signature(loads(message.replacement), app=app).apply_async(producer=producer, add_to_parent=False)
        return
    if message.envelope is None:
        return  # replaced, and what replaces it was published: its own message comes
    envelope = loads(message.envelope)
    options: dict[str, Any] = envelope.get("options", {})
    task = app.tasks.get(message.func_name)
    stamped = options.get("stamped_headers") or ()
    # A first attempt may expire in the broker; what has begun, or has ended, may not.
    expires = None if message.delivers or message.attempts else options.get("expires")
    protocol2 = app.amqp.as_task_v2(
        message.run_id,
        message.func_name,
        loads(message.args or "[]"),
        loads(message.kwargs or "{}"),
        group_id=options.get("group_id"),
        group_index=options.get("group_index"),
        expires=expires,
        retries=message.attempts,
        chord=options.get("chord"),
        callbacks=options.get("link"),
        errbacks=options.get("link_error"),
        chain=options.get("chain"),
        reply_to=options.get("reply_to") or app.thread_oid,
        time_limit=options.get("time_limit"),
        soft_time_limit=options.get("soft_time_limit"),
        create_sent_event=app.conf.task_send_sent_event and not message.delivers,
        root_id=options.get("root_id") or message.run_id,
        parent_id=options.get("parent_id"),
        shadow=options.get("shadow"),
        origin=options.get("origin"),
        ignore_result=envelope.get("ignore_result", getattr(task, "ignore_result", None)) or False,
        replaced_task_nesting=options.get("replaced_task_nesting") or 0,
        stamped_headers=stamped or None,
        **{name: options[name] for name in stamped if name in options},
    )
    headers = {**(envelope.get("headers") or {}), **({DELIVER_HEADER: 1} if message.delivers else {})}
    app.amqp.send_task_message(
        producer,
        message.func_name,
        protocol2,
        headers=headers,
        priority=native_priority(app, message.priority),
        serializer="json",
        retry=False,
        **_route(app, message, envelope, task),
    )


def _route(app: celery.Celery, message: Message, envelope: dict[str, Any], task: Any) -> dict[str, Any]:
    """Where the message came from, else its queue, else where the app's routes send it."""
    exchange, routing_key = envelope.get("exchange"), envelope.get("routing_key")
    if exchange and routing_key:
        return {"exchange": exchange, "routing_key": routing_key}
    if routing_key and not message.queue:
        return {"queue": routing_key}  # the anonymous exchange: the key is the queue's name
    if message.queue:
        return {"queue": message.queue}
    own = {"queue": task.queue} if getattr(task, "queue", None) else {}
    routed = app.amqp.router.route(
        own, message.func_name, loads(message.args or "[]"), loads(message.kwargs or "{}"), task_type=task
    )
    return {key: routed[key] for key in ("queue", "exchange", "routing_key") if routed.get(key) is not None}


def absolute(when: Any) -> str | None:
    """``expires`` as apply_async takes it, seconds or an instant, as the ISO text of an instant."""
    if when is None or isinstance(when, str):
        return when
    if isinstance(when, datetime):
        return when.isoformat()
    return (datetime.now(UTC) + timedelta(seconds=float(when))).isoformat()


def _errors_of(connection: Any) -> tuple[type[Exception], ...]:
    """What a connection raises when its server is away."""
    return (*connection.connection_errors, *connection.channel_errors, KombuError)


def _transport(app: celery.Celery) -> str:
    driver = _transports.get(app)
    if driver is None:
        driver = _transports[app] = str(app.connection_for_write().get_transport_cls().driver_type)
    return driver


def _list(value: Any) -> list[Any] | None:
    return None if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _culprit(value: Any, path: str) -> tuple[str, Any]:
    """The first part of ``value`` that JSON cannot carry, and the path to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not _fits(item):
                return _culprit(item, f"{path}[{key!r}]")
        for key in value:
            if not isinstance(key, str | int | float | bool | type(None)):
                return f"a key of {path}", key
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if not _fits(item):
                return _culprit(item, f"{path}[{index}]")
    return path, value


def _fits(value: Any) -> bool:
    try:
        kombu_json.dumps(value)
    except (TypeError, ValueError, EncodeError, RecursionError):
        return False
    return True
