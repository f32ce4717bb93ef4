"""Batches: messages of one task function, built by Celery and sent together; what they share is found out once.

``Task.apply_async`` finds out everything for each message, subscribes to each result and sends each event by itself:
with results and events on Redis, three round trips. Here is one. A result is subscribed to when somebody waits for it
(``AsyncResult.get``, which also looks whether it came before), so nobody misses it.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import celery
from kombu import exceptions
from kombu.serialization import dumps

from llmtasks.sender.envelope import SENT_HEADER
from llmtasks.sender.forms import BLANKS, desk_of, form_of
from llmtasks.sender.prints import can_print, is_own, is_watched, watches_arguments

#: Options of ``apply_async`` that say the same of all messages of a call. With any other, Celery sends one by one.
SHARED: Final = frozenset(
    {
        "add_to_parent", "compression", "confirm_timeout", "delivery_mode", "exchange", "headers", "ignore_result",
        "priority", "queue", "retry", "retry_policy", "routing_key", "serializer", "shadow", "soft_time_limit",
        "time_limit",
    }
)  # fmt: skip
#: Characters of a text among arguments that are shown as they are.
_SHORT: Final = 100

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
        and not is_watched()
        and app.amqp.create_task_message == app.amqp.as_task_v2
        and is_own(_celery.Task.apply_async)
        and is_own(getattr(app.send_task, "__func__", app.send_task))
        and not (many and watches_arguments(app))
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
        desk = desk_of(app)
        self._form = form_of(desk, task, options, args, kwargs)
        self._app, self._sent = app, desk.sent
        self._add_to_parent = options.get("add_to_parent", True)
        self._parent = app.current_worker_task
        request = self._parent.request if self._parent else None
        self._call = {
            "shadow": options.get("shadow") or task.shadow_name(args, kwargs, options),
            "root_id": (request.root_id or request.id) if request else None,
            "parent_id": request.id if request else None,
            "create_sent_event": app.conf.task_send_sent_event,
        }
        self._headers = {**self._form.headers, SENT_HEADER: time.time()}
        self._result, self._backend = task.AsyncResult, task.backend
        # Redis' subscribes. That of another backend may have to come before the message: rpc's declares a queue.
        self._announces = not self._form.ignore_result and not _only_subscribes(app.backend)
        self._events: list[Any] = []
        #: Headers, and the body with its type and encoding.
        self._waiting: deque[tuple[dict[str, Any], tuple[str, str, Any]]] = deque()

    def add(self, args: Any, kwargs: Any, task_id: str | None = None) -> Any:
        """Add a message; it is not sent yet.

        Returns:
            The handle of its result.

        Raises:
            kombu.exceptions.EncodeError: The arguments cannot be carried.
        """
        task_id = task_id or str(uuid.uuid4())
        args, kwargs = args or (), kwargs or {}
        shown = _shown(kwargs, kwargs.values()) if kwargs else "{}"
        message = self._form.message(task_id, args, kwargs, argsrepr=_shown(args, args), kwargsrepr=shown, **self._call)
        content = dumps(message.body, serializer=self._form.serializer)
        self._waiting.append((message.headers | self._headers, content))
        if message.sent_event is not None:
            self._events.append({**message.sent_event, **self._form.where})
        result = self._result(task_id, backend=self._backend)
        result.ignored = self._form.ignore_result
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
            if self._form.retries:
                policy = self._form.policy
                # kombu connects by these (connection.py:987), and without them for ever.
                producer.connection.transport_options.update(policy)
            producer.connection.ensure(producer, self._post, **policy)(producer)
        self._waiting.clear()

    def _post(self, producer: Any) -> None:
        declared = producer.connection.declared_entities
        for entity in self._form.declare:
            # kombu copies an entity each time to find that out (common.py:117).
            if hash(entity) not in declared:
                producer.maybe_declare(entity)
        printed = None
        if self._waiting and not self._announces and can_print(self._app, producer):
            content_type, encoding, _ = self._waiting[0][1]
            content = {"content_type": content_type, "content_encoding": encoding}
            printed = self._form.print_on(producer, len(self._waiting), content)
        if printed is None:
            self._post_by_kombu(producer)
            return
        channel = producer.channel
        with channel.noting() as commands:
            for headers, (_, _, body) in self._waiting:
                printed.note(channel, body, {name: headers[name] for name in BLANKS})
            self._sent.send(producer, self._events)
        channel.do(commands)

    def _post_by_kombu(self, producer: Any) -> None:
        # As kombu finds out (messaging.py:34); its ``supports_batch_publish`` parses the URL again.
        channel, how = producer.channel, self._form.how
        together = hasattr(channel, "create_publish_batch") and getattr(channel, "supports_batch_publish", True)
        try:
            with producer.batch(max_size=len(self._waiting) + 2):
                for headers, (content_type, encoding, body) in list(self._waiting):
                    content = {"content_type": content_type, "content_encoding": encoding}
                    if self._announces:
                        self._app.backend.on_task_call(producer, headers["id"])
                    producer.publish(body, **how, **content, correlation_id=headers["id"], headers=headers)
                    if not together:
                        self._waiting.popleft()
                self._sent.send(producer, self._events)
        except _exceptions.BatchPublishError as error:
            raise (error.__cause__ or error) from None


def _only_subscribes(backend: Any) -> bool:
    """Whether what a backend does before a task is sent is no more than Redis' own, or nothing."""
    return type(backend).on_task_call.__module__ in {"celery.backends.base", "celery.backends.redis"}


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
