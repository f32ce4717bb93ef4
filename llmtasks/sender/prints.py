"""Prints: messages that a channel of ours publishes, as text with blanks for what differs from one to the next.

kombu writes the first one down, with its blanks, into the commands that the channel notes (``noting``, see
``llmtasks.broker.redis``). That takes as long as publishing some messages, and the others a tenth of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from json.encoder import encode_basestring_ascii
from typing import Any

from kombu.utils.json import dumps


def blank(name: str) -> str:
    """What stands for something in the message that is written down."""
    return f"<the {name} of a message>"


def print_of(channel: Any, publish: Callable[[], object], blanks: Iterable[str]) -> Print | None:
    """The print of what ``publish`` publishes.

    Args:
        channel: The channel on which it does.
        publish: Called once; what it publishes is not sent.
        blanks: What differs beside the body and the delivery tag.

    Returns:
        None where messages differ in more than that: the channel is none of ours, they go by an exchange, whose
        bindings may change, or are compressed.
    """
    if not hasattr(channel, "noting") or channel.body_encoding != "base64":
        return None
    with channel.noting() as commands:
        publish()
    written: dict[str, Any] = json.loads(commands[0][-1]) if commands and commands[0][0] == "eval" else {}
    if not written or written["properties"]["delivery_info"]["exchange"] or "compression" in written["headers"]:
        return None
    body = channel.decode_body(written["body"], channel.body_encoding)
    return Print(commands, written, blanks, body)


class Print:
    """The commands that publish a message, with blanks in its text.

    Args:
        commands: What the channel noted: the first one ends with the text.
        written: The message of that text.
        blanks: What differs.
        body: The body of that message.

    Attributes:
        body: The same.
    """

    def __init__(
        self, commands: list[tuple[Any, ...]], written: Mapping[str, Any], blanks: Iterable[str], body: Any
    ) -> None:
        *self._command, text = commands[0]
        self._others = commands[1:]
        self.body = body
        texts = {blank(name): name for name in blanks}
        texts |= {written["body"]: "body", written["properties"]["delivery_tag"]: "delivery_tag"}
        text = text.replace("%", "%%")
        for stands, name in texts.items():
            text = text.replace(dumps(stands), f"%({name})s")
        self._text = text

    def filled(self, channel: Any, body: Any, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The commands for one message on the channel: its body as it is serialized, and what is in the blanks."""
        written = {name: _json(value) for name, value in values.items()}
        written["body"] = _json(channel.encode_body(body, channel.body_encoding)[0])
        written["delivery_tag"] = _json(channel._next_delivery_tag())
        return [(*self._command, self._text % written), *self._others]


class Recorder:
    """Stands for a producer, or an event dispatcher, and keeps what it was to publish."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def publish(self, *args: Any, **options: Any) -> None:
        """Keep it."""
        self.args, self.options = args, options


def _json(value: Any) -> str:
    """A value as kombu writes it, and sooner."""
    if value is None:
        return "null"
    kind = type(value)
    return encode_basestring_ascii(value) if kind is str else repr(value) if kind is float else str(dumps(value))
