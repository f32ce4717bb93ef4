"""Publish and revoke through Celery; read what its backend and its queues say."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import celery
from billiard.exceptions import WorkerLostError
from celery.canvas import signature
from kombu.exceptions import KombuError, OperationalError

from llmtasks.errors import BrokerUnavailableError
from llmtasks.message import Message
from llmtasks.sender.advice import missing_socket_advice
from llmtasks.sender.envelope import DELIVER_HEADER
from llmtasks.sender.jsontext import dumps, loads
from llmtasks.sender.priority import native_priority

#: Messages that one round trip to the broker carries at most.
BATCH_SIZE: Final = 200
#: Seconds that one attempt to reach the broker may take.
CONNECT_TIMEOUT: Final = 3

_local = threading.local()


@dataclass(slots=True)
class _Connection:
    """A thread's own way to the broker."""

    pid: int
    producer: Any


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
        with contextlib.suppress(Exception):  # what closing a broken connection raises differs among transports
            producer.connection.release()
        raise outage(app, error) from error


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
