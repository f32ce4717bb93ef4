"""Publish and revoke through Celery; read what its backend and its queues say."""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import celery
from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery.canvas import signature
from celery.exceptions import ImproperlyConfigured
from kombu.exceptions import KombuError, OperationalError, SerializationError

from llmtasks.errors import BrokerUnavailableError, ConfigurationError, UnavailableError
from llmtasks.message import Message
from llmtasks.sender.advice import missing_socket_advice
from llmtasks.sender.envelope import DELIVER_HEADER
from llmtasks.sender.jsontext import dumps, loads
from llmtasks.sender.priority import native_priority
from llmtasks.sender.rabbitmq import abandon, publish_options, refusal

#: Messages that one round trip to the broker carries at most.
BATCH_SIZE: Final = 200
#: Seconds that one attempt to reach the broker may take.
CONNECT_TIMEOUT: Final = 3

#: Errors of a message that will not go away: its queue is in no configuration or refused, its parts do not fit.
HOPELESS: Final = (
    SerializationError, LookupError, TypeError, ValueError, AttributeError, ImproperlyConfigured, ConfigurationError,
)  # fmt: skip

#: What a chain hands on to the last of its tasks.
_INHERITED: Final = frozenset({"chord", "group_id", "group_index", "root_id", "link_error"})

_local = threading.local()


@dataclass(slots=True)
class _Connection:
    """A thread's own way to the broker."""

    pid: int
    producer: Any


def publish(app: celery.Celery, messages: Sequence[Message]) -> dict[str, Exception]:
    """Send messages to the broker, many in one round trip where the transport can.

    Returns:
        The errors of messages that could not be sent although the broker answers, by the run's id.

    Raises:
        BrokerUnavailableError: It does not answer. Some messages may have arrived: a copy does no harm, claims drop it.
    """
    held: WeakKeyDictionary[celery.Celery, _Connection] = _local.__dict__.setdefault("held", WeakKeyDictionary())
    mine = held.get(app)
    used = mine is not None and mine.pid == os.getpid()
    if mine is None or not used:
        connection = app.connection_for_write()
        mine = held[app] = _Connection(os.getpid(), app.amqp.Producer(connection, auto_declare=False))
    producer = mine.producer
    gone: tuple[type[Exception], ...] = (*_errors_of(producer.connection), OSError, BrokerUnavailableError)
    unsendable: dict[str, Exception] = {}
    try:
        for start in range(0, len(messages), BATCH_SIZE):
            producer.connection.ensure_connection(max_retries=1, interval_start=0, timeout=CONNECT_TIMEOUT)
            with producer.batch(max_size=BATCH_SIZE):
                for message in messages[start : start + BATCH_SIZE]:
                    error = _fault_of(app, producer, message, gone)
                    if error is not None:
                        unsendable[message.run_id] = error
    except gone as error:
        held.pop(app, None)
        with contextlib.suppress(Exception):  # what closing a broken connection raises differs among transports
            abandon(app, producer.connection)
        if used:  # the broker may have closed a connection that waited: a new one tells
            return publish(app, messages)
        if isinstance(error, BrokerUnavailableError):
            raise
        raise outage(app, error) from error
    return unsendable


def _fault_of(
    app: celery.Celery, producer: Any, message: Message, gone: tuple[type[Exception], ...]
) -> Exception | None:
    """Send one message; returns what is wrong with the message itself, and raises what is wrong with anything else."""
    try:
        _publish_one(app, producer, message)
    except SerializationError as error:
        return error
    except (UnavailableError, SoftTimeLimitExceeded, MemoryError):
        raise
    except gone as error:
        refused = refusal(app, error)
        if refused is None:
            raise
        producer.revive(producer.connection.channel())  # RabbitMQ closed the other one
        return refused
    except Exception as error:
        # What the Redis result backend makes of it (backends/asynchronous.py:390).
        if error.__cause__ is not None and isinstance(error.__cause__, gone):
            raise outage(app, error.__cause__) from error
        return error
    return None


class _BrokerGoneError(BrokerUnavailableError, OperationalError):
    """Also what Celery's users catch."""


def outage(app: celery.Celery, error: BaseException) -> BrokerUnavailableError:
    """The error that says which broker does not answer, why, and what to do."""
    advice = missing_socket_advice(app.conf.broker_url or "")
    if advice is not None:
        return _BrokerGoneError(advice)
    return _BrokerGoneError(f"broker {app.connection_for_write().as_uri()} does not answer: {error}")


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
            raise outage(app, error) from error


def celery_state(app: celery.Celery, run_id: str) -> str:
    """The state that Celery's result backend has for an id; PENDING where it knows nothing."""
    try:
        state: str = app.AsyncResult(run_id).state
    except gone(app) as error:
        raise outage(app, error) from error
    return state


def queue_length(app: celery.Celery, queue: str) -> int | None:
    """How many messages wait in a queue; None where the transport cannot say.

    Raises:
        BrokerUnavailableError: The broker does not answer.
    """
    with app.connection_for_write() as connection:
        gone: tuple[type[Exception], ...] = (*_errors_of(connection), OSError)
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=CONNECT_TIMEOUT)
            declared: Any = app.amqp.queues[queue].bind(connection.default_channel).queue_declare(passive=True)
        except connection.channel_errors as error:
            return 0 if str(getattr(error, "reply_code", 404)) == "404" else None
        except gone as error:
            raise outage(app, error) from error
        except (NotImplementedError, LookupError):  # a queue in no configuration
            return None
        return int(declared.message_count)


def backend_exception(app: celery.Celery, error: Exception) -> str:
    """An error as JSON in the form of Celery's result backends, so that it can be raised again elsewhere."""
    try:
        return dumps(app.backend.prepare_exception(error, "json"), "the error")
    except Exception:  # a backend of another serializer leaves the arguments as they are; a repr may raise
        kind = type(error)
        said = traceback.format_exception_only(error)[-1].strip()
        return dumps({"exc_type": kind.__name__, "exc_message": [said], "exc_module": kind.__module__}, "the error")


def lost_failure(app: celery.Celery) -> str:
    """The error of a run whose worker stopped answering, as JSON for ``backend_exception``'s reader."""
    return backend_exception(app, WorkerLostError("the worker that held the run stopped answering"))


def _publish_one(app: celery.Celery, producer: Any, message: Message) -> None:
    """Send one message as ``app.send_task`` would, but subscribe to no result and take no parent from the caller."""
    if message.replacement is not None:
        replacement: Any = signature(loads(message.replacement), app=app)
        if message.delivers:
            replacement = _heir(replacement, message.run_id)
            if replacement is None:
                raise LookupError(f"nothing in what replaced run {message.run_id} has its id")
            headers = {**(replacement.options.get("headers") or {}), DELIVER_HEADER: 1}
            replacement.set(headers=headers, countdown=None, eta=None, expires=None)
        replacement.apply_async(producer=producer, add_to_parent=False)
        return
    if message.envelope is None:
        return  # nothing is left to send
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
        **publish_options(app),
        **_route(app, message, envelope, task),
    )


def _heir(replacement: Any, run_id: str) -> Any:
    """The one task of what replaces a run that has the run's id, and so its links and its place in a chord."""
    if replacement.options.get("task_id") == run_id and not replacement.get("subtask_type"):
        return replacement
    parts = [*(replacement.get("kwargs") or {}).get("tasks", ())]
    body = (replacement.get("kwargs") or {}).get("body")
    for part in [*reversed(parts), *([body] if body else [])]:
        found = _heir(signature(part, app=replacement.app), run_id)
        if found is not None:
            for name in _INHERITED & set(replacement.options):
                found.options.setdefault(name, replacement.options[name])
            return found
    return None


def _route(app: celery.Celery, message: Message, envelope: dict[str, Any], task: Any) -> dict[str, Any]:
    """Where the message came from, else its queue, else where the app's routes send it."""
    exchange, routing_key = envelope.get("exchange"), envelope.get("routing_key")
    if exchange and routing_key:
        return {"exchange": exchange, "routing_key": routing_key}
    if routing_key and not message.queue:
        return {"queue": routing_key}  # the anonymous exchange: the key is the queue's name
    if message.queue:
        return {"queue": message.queue}
    queue = getattr(getattr(task, "options", None), "queue", None)
    own = {"queue": queue} if queue else {}
    routed = app.amqp.router.route(
        own, message.func_name, loads(message.args or "[]"), loads(message.kwargs or "{}"), task_type=task
    )
    return {key: routed[key] for key in ("queue", "exchange", "routing_key") if routed.get(key) is not None}


def gone(app: celery.Celery) -> tuple[type[Exception], ...]:
    """What publishing raises while the broker, or the result backend that it subscribes to, is away."""
    return (*_errors_of(app.connection_for_write()), ConnectionError)


def _errors_of(connection: Any) -> tuple[type[Exception], ...]:
    """What a connection raises when its server is away."""
    return (*connection.connection_errors, *connection.channel_errors, KombuError)
