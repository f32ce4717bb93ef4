"""The envelope: what sending a run's message again needs beside its arguments, as JSON."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

import celery
from celery.app import task as celery_task

from llmtasks.message import Message
from llmtasks.sender.jsontext import dumps, loads

#: Marks a message that only tells Celery an end which the ledger has already.
DELIVER_HEADER: Final = "llm_deliver"
#: When ``.delay()`` was called, seconds since 1970: the run's row is younger than the run.
SENT_HEADER: Final = "llm_sent_at"
#: Of what ``Context.as_execution_options`` names, the ledger has these in columns of their own.
_DROPPED_OPTIONS: Final = frozenset({"task_id", "retries", "headers"})
#: Its stub is older than get_actual_ignore_result.
_task_module: Any = celery_task


def envelope_of_request(request: Any, ignore_result: bool | None) -> str:
    """What sending the current request's message again needs, arguments aside, as JSON."""
    options = {
        key: value
        for key, value in request.as_execution_options().items()
        if _says_something(value) and key not in _DROPPED_OPTIONS
    }
    headers = {key: value for key, value in (request.headers or {}).items() if key not in {DELIVER_HEADER, SENT_HEADER}}
    where = request.delivery_info or {}
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
    return bool(message.envelope and message.schedule_id and loads(message.envelope).get("handed"))


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
