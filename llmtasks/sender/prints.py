"""Prints: messages that a channel of ours publishes, as text with blanks for what differs from one to the next.

kombu writes the first one down, with its blanks, into the commands that the channel notes (``noting``, see
``llmtasks.broker.redis``). That takes as long as publishing some messages, and the others a tenth of it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from json.encoder import encode_basestring_ascii
from types import FunctionType
from typing import Any, Final, Generic, TypeVar
from weakref import WeakKeyDictionary

from celery import signals
from celery.app.routes import MapRoute
from kombu.utils.json import dumps

T = TypeVar("T")

#: What may look at a message, or change it, before it is sent, and hears when it was.
_WATCHED: Final = (signals.before_task_publish, signals.after_task_publish, signals.task_sent)
#: Messages that go before a print is made: some are one of a kind.
_MANY: Final = 5
#: In no message by chance.
_SIGN: Final = uuid.uuid4().hex


def is_watched() -> bool:
    """Whether somebody receives a signal of each message."""
    return any(signal.receivers for signal in _WATCHED)


def watches_arguments(app: Any) -> bool:
    """Whether a router may look at the arguments of each message."""
    return any(type(router) is not MapRoute for router in app.amqp.router.routes)


def is_own(function: Any, package: str = "celery") -> bool:
    """Whether a function is what its package defined, with nothing around it, as tracing libraries put it."""
    return isinstance(function, FunctionType) and function.__globals__["__name__"].split(".")[0] == package


def can_print(app: Any, producer: Any) -> bool:
    """Whether a producer's channel is one of ours, and nobody changes messages on their way to it."""
    kind = type(producer)
    return (
        hasattr(producer.channel, "noting")
        and producer.channel.supports_batch_publish
        and not is_watched()
        and is_own(type(app.amqp).as_task_v2)
        and is_own(kind.publish, "kombu")
        and is_own(kind._publish, "kombu")
    )


def blank(name: str) -> str:
    """What stands for something in the message that is written down."""
    return f"<the {name} of message {_SIGN}>"


def print_of(channel: Any, publish: Callable[[], object], blanks: Iterable[str]) -> Print | None:
    """The print of what ``publish`` publishes.

    Args:
        channel: The channel on which it does.
        publish: Called once; what it publishes is not sent.
        blanks: What differs beside the body and the delivery tag.

    Returns:
        None where messages differ in more than that: they go by an exchange, whose bindings may change, or are
        compressed.
    """
    with channel.noting() as commands:
        publish()
    written: dict[str, Any] = json.loads(commands[0][-1]) if commands and commands[0][0] == "eval" else {}
    if not written or written["properties"]["delivery_info"]["exchange"] or "compression" in written["headers"]:
        return None
    if written["properties"]["body_encoding"] != "base64":
        return None
    return Print(commands, written, blanks)


class Print:
    """The commands that publish a message, with blanks in its text.

    Args:
        commands: What the channel noted: the first one ends with the text.
        written: The message of that text.
        blanks: What differs.
    """

    def __init__(self, commands: list[tuple[Any, ...]], written: Mapping[str, Any], blanks: Iterable[str]) -> None:
        *self._command, text = commands[0]
        self._others = commands[1:]
        texts = {blank(name): name for name in blanks}
        texts |= {written["body"]: "body", written["properties"]["delivery_tag"]: "delivery_tag"}
        text = text.replace("%", "%%")
        for stands, name in texts.items():
            text = text.replace(dumps(stands), f"%({name})s")
        self._text = text

    def note(self, channel: Any, body: Any, values: Mapping[str, Any]) -> None:
        """Note a message on the channel: its body as it is serialized, and what is in the blanks."""
        written = {name: _json(value) for name, value in values.items()}
        written["body"] = _json(channel.encode_body(body, channel.body_encoding)[0])
        written["delivery_tag"] = _json(channel._next_delivery_tag())
        channel.note([(*self._command, self._text % written), *self._others])


class Press(Generic[T]):
    """What is made for a channel once, when some messages have gone there."""

    def __init__(self) -> None:
        self._sent: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._made: WeakKeyDictionary[Any, T | None] = WeakKeyDictionary()

    def made_for(self, channel: Any, count: int, make: Callable[[], T | None]) -> T | None:
        """What there is for the next ``count`` messages; None as long as they are too few, or ``make`` says so."""
        if channel not in self._made:
            sent = self._sent[channel] = self._sent.get(channel, 0) + count
            if sent < _MANY:
                return None
            self._made[channel] = make()
        return self._made[channel]


def _json(value: Any) -> str:
    """A value as kombu writes it, and sooner."""
    if value is None:
        return "null"
    kind = type(value)
    return encode_basestring_ascii(value) if kind is str else repr(value) if kind is float else str(dumps(value))
