"""Publish and revoke through Celery; read what its backend and its queues say."""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

import celery
from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery.exceptions import ImproperlyConfigured
from kombu.exceptions import KombuError, OperationalError, SerializationError

from llmtasks.errors import BrokerUnavailableError, ConfigurationError, UnavailableError
from llmtasks.message import Message
from llmtasks.sender.advice import missing_socket_advice
from llmtasks.sender.jsontext import dumps
from llmtasks.sender.rabbitmq import abandon, refusal
from llmtasks.sender.sending import Way, send_one
from llmtasks.sender.sent_events import SentEvents

#: Messages that one round trip to the broker carries at most.
BATCH_SIZE: Final = 200
#: Seconds that one attempt to reach the broker may take.
CONNECT_TIMEOUT: Final = 3

#: Errors of a message that will not go away: its queue is in no configuration or refused, its parts do not fit.
HOPELESS: Final = (
    SerializationError, LookupError, TypeError, ValueError, AttributeError, ImproperlyConfigured, ConfigurationError,
)  # fmt: skip

_local = threading.local()


def publish(app: celery.Celery, messages: Sequence[Message]) -> dict[str, Exception]:
    """Send messages to the broker, many in one round trip where the transport can.

    Returns:
        The errors of messages that could not be sent although the broker answers, by the run's id.

    Raises:
        BrokerUnavailableError: It does not answer. Some messages may have arrived: a copy does no harm, claims drop it.
    """
    held: WeakKeyDictionary[celery.Celery, Way] = _local.__dict__.setdefault("held", WeakKeyDictionary())
    mine = held.get(app)
    used = mine is not None and mine.pid == os.getpid()
    if mine is None or not used:
        connection = app.connection_for_write()
        mine = held[app] = Way(os.getpid(), app.amqp.Producer(connection, auto_declare=False), SentEvents(app))
    producer = mine.producer
    gone: tuple[type[Exception], ...] = (*_errors_of(producer.connection), OSError, BrokerUnavailableError)
    unsendable: dict[str, Exception] = {}
    try:
        for start in range(0, len(messages), BATCH_SIZE):
            producer.connection.ensure_connection(max_retries=1, interval_start=0, timeout=CONNECT_TIMEOUT)
            mine.look_at(app)
            with _in_one_go(producer):
                for message in messages[start : start + BATCH_SIZE]:
                    error = _fault_of(app, mine, message, gone)
                    if error is not None:
                        unsendable[message.run_id] = error
                mine.sent.send_gathered(producer)
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


@contextlib.contextmanager
def _in_one_go(producer: Any) -> Generator[None]:
    """What is published inside goes in one round trip, where the transport can."""
    channel = producer.channel
    if not (hasattr(channel, "noting") and channel.supports_batch_publish):
        with producer.batch(max_size=BATCH_SIZE):
            yield
        return
    with channel.noting() as commands:
        yield
    channel.do(commands)


def _fault_of(app: celery.Celery, way: Way, message: Message, gone: tuple[type[Exception], ...]) -> Exception | None:
    """Send one message; returns what is wrong with the message itself, and raises what is wrong with anything else."""
    try:
        send_one(app, way, message)
    except SerializationError as error:
        return error
    except (UnavailableError, SoftTimeLimitExceeded, MemoryError):
        raise
    except gone as error:
        refused = refusal(app, error)
        if refused is None:
            raise
        way.producer.revive(way.producer.connection.channel())  # RabbitMQ closed the other one
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


def gone(app: celery.Celery) -> tuple[type[Exception], ...]:
    """What publishing raises while the broker, or the result backend that it subscribes to, is away."""
    return (*_errors_of(app.connection_for_write()), ConnectionError)


def _errors_of(connection: Any) -> tuple[type[Exception], ...]:
    """What a connection raises when its server is away."""
    return (*connection.connection_errors, *connection.channel_errors, KombuError)
