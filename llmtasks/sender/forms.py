"""Forms: what messages of one task function with the same options share, found out once.

Celery says where and how it would send one of them, and kombu how it would write it down (``prints``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

from llmtasks.sender.envelope import SENT_HEADER
from llmtasks.sender.prints import Press, Print, blank, print_of, watches_arguments
from llmtasks.sender.sent_events import SentEvents

#: Headers that differ from one message of a form to the next.
BLANKS: Final = ("id", "root_id", "parent_id", "shadow", "argsrepr", "kwargsrepr", SENT_HEADER)
#: Options of one call, not of the form.
_OF_CALL: Final = frozenset({"add_to_parent", "shadow"})
#: Types of options with which a form is kept for the next call.
_PLAIN: Final = frozenset({bool, float, int, str, type(None)})
#: Kept forms of one app and thread.
_MOST: Final = 256

_local = threading.local()


@dataclass(slots=True)
class Desk:
    """What one thread keeps of an app. What was made in another process has another ``pid``."""

    pid: int
    sent: SentEvents
    forms: dict[tuple[Any, ...], Form]


def desk_of(app: Any) -> Desk:
    """This thread's own."""
    held: WeakKeyDictionary[Any, Desk] = _local.__dict__.setdefault("held", WeakKeyDictionary())
    found = held.get(app)
    if found is None or found.pid != os.getpid():
        found = held[app] = Desk(os.getpid(), SentEvents(app), {})
    return found


def form_of(desk: Desk, task: Any, options: Mapping[str, Any], args: Any, kwargs: Any) -> Form:
    """The form of a task's messages; kept where plain options say all."""
    app = task.app
    plain = {name: value for name, value in options.items() if name not in _OF_CALL}
    route = route_of(app, task.name, task)
    if route is None or not _PLAIN.issuperset(map(type, plain.values())):
        return Form(desk, task, plain, args, kwargs)
    key = (task.name, task.ignore_result, app.conf.task_default_queue, route, *plain.items())
    found = desk.forms.get(key)
    if found is None or not found.holds_for(task):
        if len(desk.forms) >= _MOST:
            desk.forms.clear()
        found = desk.forms[key] = Form(desk, task, plain, args, kwargs)
    return found


def route_of(app: Any, name: str, task: Any) -> tuple[Any, ...] | None:
    """What the app's routes say of a function's messages, to be compared; None where more than plain values do."""
    if watches_arguments(app):
        return None
    router = app.amqp.router
    route = (router.lookup_route(name, (), {}, {}, task) or {}) if router.routes else {}
    return tuple(route.items()) if _PLAIN.issuperset(map(type, route.values())) else None


class Form:
    """How the messages of one task with the same options are sent.

    Attributes:
        ignore_result: Whether their results are not stored.
        how: What ``Producer.publish`` is told of all of them.
        headers: Headers that all of them have beside Celery's own.
        declare: What has to be declared before.
        retries: Whether a broken connection is tried again, and how.
        policy: The same.
        serializer: Of their bodies.
        where: What sent events say of their way.
    """

    def __init__(self, desk: Desk, task: Any, options: Mapping[str, Any], args: Any, kwargs: Any) -> None:
        amqp = task.app.amqp
        own = {name: value for name, value in task._get_exec_options().items() if value is not None}
        given = {**own, **options}
        ignore_result = given.pop("ignore_result", None)
        self.ignore_result = task.ignore_result if ignore_result is None else ignore_result
        self.headers: dict[str, Any] = given.pop("headers", None) or {}
        self._limits = {name: given.pop(name, None) for name in ("time_limit", "soft_time_limit")}
        self._task, self._amqp, self._origin = task, amqp, desk.sent.hostname
        self._reply_to = task.app.thread_oid
        self._router, self._queues = amqp.router, amqp.queues
        # How Celery would send one message says how to send all.
        publication, event = Recorder(), Recorder()
        routed = amqp.router.route(given, task.name, args, kwargs, task)
        sample = self.message("", (), {}, create_sent_event=True)
        amqp.send_task_message(publication, task.name, sample, event_dispatcher=event, **routed)
        self.how: dict[str, Any] = publication.options
        for name in ("correlation_id", "headers"):
            self.how.pop(name, None)
        self.retries, self.policy = self.how.pop("retry"), self.how.pop("retry_policy")
        self.declare = self.how.pop("declare") or []
        self.serializer = self.how.pop("serializer")
        told: Any = event.args[1]
        self.where = {name: told.get(name) for name in ("queue", "exchange", "routing_key")}
        self._queue = self._queues.get(self.where["queue"])
        self._press: Press[Print] = Press()

    def holds_for(self, task: Any) -> bool:
        """Whether the app still sends these messages so."""
        amqp = self._amqp
        return (
            self._task is task
            and amqp is task.app.amqp
            and amqp.router is self._router
            and amqp.queues is self._queues
            and self._queues.get(self.where["queue"]) is self._queue
        )

    def message(self, task_id: str, args: Any, kwargs: Any, **options: Any) -> Any:
        """One message as Celery makes it."""
        return self._amqp.as_task_v2(
            task_id,
            self._task.name,
            args,
            kwargs,
            reply_to=self._reply_to,
            origin=self._origin,
            ignore_result=self.ignore_result,
            **self._limits,
            **options,
        )

    def print_on(self, producer: Any, count: int, content: Mapping[str, str]) -> Print | None:
        """The print of these messages for a producer's channel; None where there is none.

        Args:
            producer: One with which ``can_print``.
            count: How many are sent now.
            content: The type and the encoding of their bodies.
        """
        return self._press.made_for(producer.channel, count, lambda: self._print(producer, content))

    def _print(self, producer: Any, content: Mapping[str, str]) -> Print | None:
        headers = {**self.message("", (), {}).headers, **self.headers, **{name: blank(name) for name in BLANKS}}

        def publish() -> None:
            producer.publish(blank("body"), **self.how, **content, correlation_id=blank("id"), headers=headers)

        return print_of(producer.channel, publish, BLANKS)


class Recorder:
    """Stands for a producer, or an event dispatcher, and keeps what it was to publish."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def publish(self, *args: Any, **options: Any) -> None:
        """Keep it."""
        self.args, self.options = args, options
