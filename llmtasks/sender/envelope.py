"""The envelope: what sending a run's message again needs beside its arguments, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final

import celery
from celery.app import task as celery_task

from llmtasks.message import Message
from llmtasks.sender.jsontext import dumps, loads

#: Marks a message that only tells Celery an end which the ledger has already.
DELIVER_HEADER: Final = "llm_deliver"
#: When ``.delay()`` was called, seconds since 1970: the run's row is younger than the run.
SENT_HEADER: Final = "llm_sent_at"
#: Characters up to which envelopes are remembered: longer ones have links, and are one run's own.
SHARED_LENGTH: Final = 1_000
#: Of what ``Context.as_execution_options`` names, the ledger has these in columns of their own.
_DROPPED_OPTIONS: Final = frozenset({"task_id", "retries", "headers"})
#: What ties a run to others, or is its own; the envelope of one without any of it depends on the function alone.
_RARE: Final = (
    "parent_id", "group", "group_index", "chord", "chain", "callbacks", "errbacks", "shadow", "expires",
    "replaced_task_nesting", "stamped_headers",
)  # fmt: skip
#: Its stub is older than get_actual_ignore_result.
_task_module: Any = celery_task


def envelope_of_request(request: Any, ignore_result: bool | None) -> str:
    """What sending the current request's message again needs, arguments aside, as JSON."""
    headers = {key: value for key, value in (request.headers or {}).items() if key not in {DELIVER_HEADER, SENT_HEADER}}
    where = request.delivery_info or {}
    if not headers and request.root_id in {None, request.id} and not any(getattr(request, name) for name in _RARE):
        limits = tuple(request.timelimit or ())
        exchange, routing_key = where.get("exchange") or "", where.get("routing_key")
        return _plain(limits, request.reply_to, request.origin, ignore_result, exchange, routing_key)
    options = {
        key: value
        for key, value in request.as_execution_options().items()
        if _says_something(value) and key not in _DROPPED_OPTIONS
    }
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


@lru_cache(maxsize=1024)
def _plain(
    limits: tuple[float | None, ...],
    reply_to: str | None,
    origin: str | None,
    ignore_result: bool | None,
    exchange: str,
    routing_key: str | None,
) -> str:
    """The envelope of a run that stands alone: all those that one process sends of a function are alike."""
    hard, soft = limits or (None, None)
    options = {"soft_time_limit": soft, "time_limit": hard, "reply_to": reply_to, "origin": origin}
    return dumps(
        {
            "options": {key: value for key, value in options.items() if _says_something(value)},
            "headers": {},
            "ignore_result": ignore_result,
            "exchange": exchange,
            "routing_key": routing_key,
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
            "options": {key: value for key, value in kept.items() if _says_something(value)},
            "headers": options.get("headers") or {},
            "ignore_result": options.get("ignore_result"),
            "exchange": options.get("exchange") or "",
            "routing_key": options.get("routing_key"),
            "handed": bool(options.get("handed")),
        },
        "the options",
    )


def ignores_result(task: Any, request: Any) -> bool | None:
    """Whether this run's result is not to be stored: what its message says, else what its task does."""
    found: bool | None = _task_module.get_actual_ignore_result(task, request)
    return found


def is_handed(app: celery.Celery, message: Message) -> bool:
    """Whether the message is for a plain Celery task, of which the ledger hears no more.

    That is one of the app's own, or a function whose ledger was turned off after the run was opened.
    """
    if not getattr(app.tasks.get(message.func_name), "is_recorded", True):
        return True
    return bool(message.envelope and message.schedule_id and read(message.envelope).get("handed"))


def read(envelope: str) -> Mapping[str, Any]:
    """What an envelope says, to be looked at only: all runs of a schedule share one."""
    return _read(envelope) if len(envelope) <= SHARED_LENGTH else loads(envelope)


@lru_cache(maxsize=256)
def _read(envelope: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = loads(envelope)
    return found


def absolute(when: Any) -> str | None:
    """``expires`` as apply_async takes it, seconds or an instant, as the ISO text of an instant."""
    if when is None or isinstance(when, str):
        return when
    if isinstance(when, datetime):
        return when.isoformat()
    return (datetime.now(UTC) + timedelta(seconds=float(when))).isoformat()


def _says_something(value: Any) -> bool:
    """Whether an option has to be kept. 0 has: it is the first member's place in a group."""
    return bool(value) or (isinstance(value, int) and not isinstance(value, bool))


def _list(value: Any) -> list[Any] | None:
    return None if value is None else list(value) if isinstance(value, list | tuple) else [value]
