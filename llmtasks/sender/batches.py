"""Batches: messages of one task function, built by Celery and sent together; what they share is found out once.

``Task.apply_async`` finds out everything for each message, subscribes to each result and sends each event by itself:
with results and events on Redis, three round trips. Here is one. A result is subscribed to when somebody waits for it
(``AsyncResult.get``, which also looks whether it came before), so nobody misses it.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from types import FunctionType
from typing import Any, Final
from weakref import WeakKeyDictionary

import celery
from celery import signals
from celery.app.routes import MapRoute
from kombu import exceptions
from kombu.serialization import dumps

from llmtasks.sender.envelope import SENT_HEADER
from llmtasks.sender.sent_events import SentEvents

#: Options of ``apply_async`` that say the same of all messages of a call. With any other, Celery sends one by one.
SHARED: Final = frozenset(
    {
        "add_to_parent", "compression", "confirm_timeout", "delivery_mode", "exchange", "headers", "ignore_result",
        "priority", "queue", "retry", "retry_policy", "routing_key", "serializer", "shadow", "soft_time_limit",
        "time_limit",
    }
)  # fmt: skip
#: What may look at a message, or change it, before it is sent, and hears when it was.
_WATCHED: Final = (signals.before_task_publish, signals.after_task_publish, signals.task_sent)
#: Characters of a text among arguments that are shown as they are.
_SHORT: Final = 100

_local = threading.local()
_celery: Any = celery
#: Its stub is older.
_exceptions: Any = exceptions


def is_shared(task: Any, options: Mapping[str, Any], *, many: bool = False) -> bool:
    """Whether messages with these options may be sent as a batch.

    Not where the app watches each message (signals), where something is wrapped around Celery's sending, as tracing
    libraries do, or where a router may look at the arguments of each of ``many``.
    """
    app = task.app
    return (
        SHARED.issuperset(options)
        and task.expires is None
        and task._dump_pydantic_arguments is None
        and not any(signal.receivers for signal in _WATCHED)
        and app.amqp.create_task_message == app.amqp.as_task_v2
        and _is_own(_celery.Task.apply_async)
        and _is_own(getattr(app.send_task, "__func__", app.send_task))
        and not (many and any(not isinstance(router, MapRoute) for router in app.amqp.router.routes))
    )


class Batch:
    """Messages of one task function with the same options.

    Args:
        task: The task.
        options: Those of ``apply_async``; the priority is the transport's own.
        args: Positional arguments of the first message, which a router may look at.
        kwargs: Its keyword arguments.
    """

    def __init__(self, task: Any, options: Mapping[str, Any], args: Any = (), kwargs: Any = None) -> None:
        app = task.app
        own = {name: value for name, value in task._get_exec_options().items() if value is not None}
        given = {**own, **options}
        self._add_to_parent = given.pop("add_to_parent", True)
        self._ignore_result = given.pop("ignore_result", None)
        if self._ignore_result is None:
            self._ignore_result = task.ignore_result
        self._shadow = given.pop("shadow", None) or task.shadow_name(args, kwargs, given)
        self._limits = {name: given.pop(name, None) for name in ("time_limit", "soft_time_limit")}
        self._headers = {**(given.pop("headers", None) or {}), SENT_HEADER: time.time()}
        self._task, self._app, self._amqp = task, app, app.amqp
        self._parent = app.current_worker_task
        request = self._parent.request if self._parent else None
        self._root_id = (request.root_id or request.id) if request else None
        self._parent_id = request.id if request else None
        self._reply_to = app.thread_oid
        self._result, self._backend = task.AsyncResult, task.backend
        # Redis' subscribes. That of another backend may have to come before the message: rpc's declares a queue.
        self._announces = not self._ignore_result and not _only_subscribes(app.backend)
        self._tells_sent = app.conf.task_send_sent_event
        self._sent = _sent_events(app)
        self._events: list[Any] = []
        self._waiting: deque[tuple[Any, dict[str, Any]]] = deque()
        # How Celery would send one message says how to send all.
        publication, event = _Recorder(), _Recorder()
        router = app.amqp.router
        if not router.routes and not {"queue", "exchange"} & set(given):
            given["queue"] = app.amqp.default_queue
        routed = router.route(given, task.name, args, kwargs, task)
        sample = self._message("", (), {})
        app.amqp.send_task_message(publication, task.name, sample, event_dispatcher=event, **routed)
        self._how: dict[str, Any] = publication.options
        properties = sample.properties
        for name in ("correlation_id", "headers"):
            self._how.pop(name, None)
            properties.pop(name, None)
        self._retries, self._policy = self._how.pop("retry"), self._how.pop("retry_policy")
        self._declare = self._how.pop("declare") or []
        self._serializer = self._how.pop("serializer")
        told: Any = event.args[1] if event.args else {}
        self._where = {name: told.get(name) for name in ("queue", "exchange", "routing_key")}

    def add(self, args: Any, kwargs: Any, task_id: str | None = None) -> Any:
        """Add a message; it is not sent yet.

        Returns:
            The handle of its result.

        Raises:
            kombu.exceptions.EncodeError: The arguments cannot be carried.
        """
        task_id = task_id or str(uuid.uuid4())
        message = self._message(task_id, args or (), kwargs or {})
        content_type, encoding, body = dumps(message.body, serializer=self._serializer)
        how = {
            **self._how,
            "content_type": content_type,
            "content_encoding": encoding,
            "correlation_id": task_id,
            "headers": {**message.headers, **self._headers},
        }
        self._waiting.append((body, how))
        if message.sent_event is not None:
            self._events.append({**message.sent_event, **self._where})
        result = self._result(task_id, backend=self._backend)
        result.ignored = self._ignore_result
        if self._parent and self._add_to_parent:
            self._parent.add_trail(result)
        return result

    @property
    def unsent(self) -> int:
        """How many messages were not sent, or perhaps not."""
        return len(self._waiting)

    def send(self) -> None:
        """Send all messages; again where the connection broke and the app's ``task_publish_retry`` says so.

        What the broker had taken then is there twice; claims drop copies.

        Raises:
            Exception: What Celery's ``apply_async`` raises while the broker is away. ``unsent`` were perhaps not sent.
        """
        with self._app.producer_or_acquire() as producer:
            policy = {"max_retries": 0}
            if self._retries:
                policy = self._policy
                # kombu connects by these (connection.py:987), and without them for ever.
                producer.connection.transport_options.update(policy)
            producer.connection.ensure(producer, self._post, **policy)(producer)
        self._waiting.clear()

    def _post(self, producer: Any) -> None:
        declared = producer.connection.declared_entities
        for entity in self._declare:
            # kombu copies an entity each time to find that out (common.py:117).
            if hash(entity) not in declared:
                producer.maybe_declare(entity)
        # As kombu finds out (messaging.py:34); its ``supports_batch_publish`` parses the URL again.
        channel = producer.channel
        together = hasattr(channel, "create_publish_batch") and getattr(channel, "supports_batch_publish", True)
        try:
            with producer.batch(max_size=len(self._waiting) + 2):
                for body, how in list(self._waiting):
                    if self._announces:
                        self._app.backend.on_task_call(producer, how["correlation_id"])
                    producer.publish(body, **how)
                    if not together:
                        self._waiting.popleft()
                self._sent.send(producer, self._events)
        except _exceptions.BatchPublishError as error:
            raise (error.__cause__ or error) from None

    def _message(self, task_id: str, args: Any, kwargs: Any) -> Any:
        return self._amqp.as_task_v2(
            task_id,
            self._task.name,
            args,
            kwargs,
            reply_to=self._reply_to,
            create_sent_event=self._tells_sent,
            root_id=self._root_id,
            parent_id=self._parent_id,
            shadow=self._shadow,
            origin=self._sent.hostname,
            argsrepr=_shown(args, args),
            kwargsrepr=_shown(kwargs, kwargs.values()) if kwargs else "{}",
            ignore_result=self._ignore_result,
            **self._limits,
        )


class _Recorder:
    """Stands for a producer, or an event dispatcher, and keeps what it was to publish."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def publish(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options


def _only_subscribes(backend: Any) -> bool:
    """Whether what a backend does before a task is sent is no more than Redis' own, or nothing."""
    return type(backend).on_task_call.__module__ in {"celery.backends.base", "celery.backends.redis"}


def _sent_events(app: Any) -> SentEvents:
    """This thread's own of an app; what made it in another process has another ``pid``."""
    held: WeakKeyDictionary[Any, SentEvents] = _local.__dict__.setdefault("held", WeakKeyDictionary())
    found = held.get(app)
    if found is None or found.pid != os.getpid():
        found = held[app] = SentEvents(app)
    return found


def _shown(value: Any, parts: Any) -> str | None:
    """What events and ``inspect`` show of arguments; None leaves it to Celery, which takes longer and cuts."""
    if len(parts) > 10:
        return None
    for part in parts:
        kind = type(part)
        if kind is str:
            # Celery escapes these in a way of its own (utils/saferepr.py:211).
            if len(part) > _SHORT or "'" in part or "\\" in part or not part.isprintable():
                return None
        elif kind is not int and kind is not float and kind is not bool and part is not None:
            return None
    return repr(value)


def _is_own(function: Any) -> bool:
    """Whether a function of Celery is what Celery defined, with nothing around it."""
    return isinstance(function, FunctionType) and function.__globals__["__name__"].startswith("celery.")
