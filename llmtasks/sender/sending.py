"""Send one message of ours as Celery sends a task.

Most of what a beat sends differs from the message before it in ids and arguments only; those are printed (``prints``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import celery
from celery.canvas import signature
from kombu.serialization import dumps as serialize

from llmtasks.message import Message
from llmtasks.sender.envelope import DELIVER_HEADER, read
from llmtasks.sender.forms import Recorder, route_of
from llmtasks.sender.jsontext import loads
from llmtasks.sender.prints import Press, Print, blank, can_print, print_of
from llmtasks.sender.priority import native_priority
from llmtasks.sender.rabbitmq import publish_options
from llmtasks.sender.sent_events import SentEvents

#: What a chain hands on to the last of its tasks.
_INHERITED: Final = frozenset({"chord", "group_id", "group_index", "root_id", "link_error"})
#: Characters of arguments as JSON that are shown as they are.
SHORT: Final = 200
#: Options that messages of a function share; with any other a message is one of a kind.
_SHARED: Final = frozenset({"origin", "reply_to", "soft_time_limit", "time_limit"})
#: What differs among messages that share everything else, beside their bodies.
_BLANKS: Final = ("id", "argsrepr", "kwargsrepr")
#: What their bodies say of links, chains and chords.
_EMBED: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
#: Kinds of messages that are known of one app and thread.
_MOST: Final = 256


@dataclass(frozen=True, slots=True)
class _Alike:
    """What messages of one kind have in common: their text, and what their events say."""

    text: Print
    told: dict[str, Any] | None


@dataclass(slots=True)
class Way:
    """A thread's own way to the broker."""

    pid: int
    producer: Any
    sent: SentEvents
    #: By kind of message.
    presses: dict[tuple[Any, ...], Press[_Alike]] = field(default_factory=dict)
    #: Whether messages may be printed now.
    prints: bool = False
    #: What of the app they depend on.
    app_has: tuple[Any, ...] = ()

    def look_at(self, app: celery.Celery) -> None:
        """Forget what the app does otherwise by now."""
        amqp, conf = app.amqp, app.conf
        has = (amqp.router, amqp.queues, conf.task_default_queue, conf.task_send_sent_event)
        self.prints = can_print(app, self.producer)
        if has != self.app_has or len(self.presses) > _MOST:
            self.presses.clear()
            self.app_has = has


def send_one(app: celery.Celery, way: Way, message: Message) -> None:
    """Send one message as ``app.send_task`` would, but subscribe to no result and take no parent from the caller."""
    producer = way.producer
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
    args, kwargs = loads(message.args or "[]"), loads(message.kwargs or "{}")
    shown = _shown(tuple(args), message.args), _shown(kwargs, message.kwargs)
    plain = type(args) is list and type(kwargs) is dict and None not in shown
    alike = _alike(app, way, message) if plain else None
    if alike is None:
        _send(app, way, message, args, kwargs, shown, way.sent)
        return
    _, _, body = serialize((args, kwargs, _EMBED), serializer="json")
    alike.text.note(producer.channel, body, dict(zip(_BLANKS, (message.run_id, *shown), strict=True)))
    if alike.told is not None:
        ids = {"uuid": message.run_id, "root_id": message.run_id}
        way.sent.publish("task-sent", {**alike.told, **ids, "args": shown[0], "kwargs": shown[1]}, producer)


def _alike(app: celery.Celery, way: Way, message: Message) -> _Alike | None:
    """What a message has in common with others; None where it is one of a kind, or the first of its kind."""
    if not way.prints or message.delivers or message.attempts:
        return None
    if not _SHARED.issuperset(read(message.envelope or "").get("options", {})):
        return None
    task = app.tasks.get(message.func_name)
    route = route_of(app, message.func_name, task)
    if route is None:
        return None
    own = getattr(task, "ignore_result", None), getattr(getattr(task, "options", None), "queue", None)
    key = (message.func_name, message.envelope, message.queue, message.priority, *own, route)
    press = way.presses.get(key)
    if press is None:
        press = way.presses[key] = Press()
    return press.made_for(way.producer.channel, 1, lambda: _made(app, way, message))


def _made(app: celery.Celery, way: Way, message: Message) -> _Alike | None:
    sample, shown = replace(message, run_id=blank("id")), (blank("argsrepr"), blank("kwargsrepr"))
    events = Recorder()
    text = print_of(way.producer.channel, partial(_send, app, way, sample, (), {}, shown, events), _BLANKS)
    return None if text is None else _Alike(text, events.args[1] if events.args else None)


def _send(
    app: celery.Celery,
    way: Way,
    message: Message,
    args: Any,
    kwargs: Any,
    shown: tuple[str | None, str | None],
    events: Any,
) -> None:
    producer = way.producer
    envelope = read(message.envelope or "")
    options: Mapping[str, Any] = envelope.get("options", {})
    task = app.tasks.get(message.func_name)
    stamped = options.get("stamped_headers") or ()
    # A first attempt may expire in the broker; what has begun, or has ended, may not.
    expires = None if message.delivers or message.attempts else options.get("expires")
    route = _route(app, message, envelope, task, args, kwargs)
    protocol2 = app.amqp.as_task_v2(
        message.run_id,
        message.func_name,
        args,
        kwargs,
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
        # Celery asks the system for it each time.
        origin=options.get("origin") or way.sent.hostname,
        argsrepr=shown[0],
        kwargsrepr=shown[1],
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
        event_dispatcher=events,
        declare=_undeclared(app, producer, route),
        **publish_options(app),
        **route,
    )


def _shown(value: Any, text: str | None) -> str | None:
    """What events and ``inspect`` show of arguments; None leaves long ones to Celery, which takes longer and cuts."""
    return repr(value) if text is None or len(text) <= SHORT else None


def _undeclared(app: celery.Celery, producer: Any, route: dict[str, Any]) -> list[Any] | None:
    """What Celery has to declare; None is what it does by itself.

    Kombu remembers what was declared on a connection, but copies a queue each time to find that out (common.py:117).
    """
    queue = route.get("queue")
    if isinstance(queue, str):
        queue = app.amqp.queues[queue]
    return [] if queue is not None and hash(queue) in producer.connection.declared_entities else None


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


def _route(
    app: celery.Celery, message: Message, envelope: Mapping[str, Any], task: Any, args: Any, kwargs: Any
) -> dict[str, Any]:
    """Where the message came from, else its queue, else where the app's routes send it."""
    exchange, routing_key = envelope.get("exchange"), envelope.get("routing_key")
    if exchange and routing_key:
        return {"exchange": exchange, "routing_key": routing_key}
    if routing_key and not message.queue:
        return {"queue": routing_key}  # the anonymous exchange: the key is the queue's name
    if message.queue:
        return {"queue": message.queue}
    queue = getattr(getattr(task, "options", None), "queue", None)
    router: Any = app.amqp.router
    own = {"queue": queue} if queue else {}
    routed = router.route(own, message.func_name, args, kwargs, task_type=task)
    return {key: routed[key] for key in ("queue", "exchange", "routing_key") if routed.get(key) is not None}
