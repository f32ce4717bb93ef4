"""Values as JSON texts, with Celery's extensions for dates, UUIDs and decimals."""

from __future__ import annotations

import json
from typing import Any, Final

from kombu.exceptions import EncodeError
from kombu.utils import json as kombu_json

from llmtasks.errors import InvalidParamsError

#: Kombu makes one of each anew for every text.
_ENCODER: Final = kombu_json.JSONEncoder()
_DECODER: Final = json.JSONDecoder(object_hook=kombu_json.object_hook)


def dumps(value: Any, what: str) -> str:
    """``value`` as JSON, with Celery's extensions for dates, UUIDs and decimals.

    Raises:
        InvalidParamsError: JSON cannot carry it; the error names the path to the value.
    """
    try:
        return _ENCODER.encode(value)
    except (TypeError, ValueError, EncodeError, RecursionError) as error:
        path, culprit = _culprit(value, what)
        raise InvalidParamsError(
            f"{path} is {culprit!r:.200} of type {type(culprit).__name__}: expected what JSON can carry "
            "(text, numbers, booleans, None, lists, dicts, dates, UUID, Decimal); pass an id or a dict instead"
        ) from error


def loads(text: str) -> Any:
    """What ``dumps`` made a text of."""
    return _DECODER.decode(text)


def _culprit(value: Any, path: str) -> tuple[str, Any]:
    """The first part of ``value`` that JSON cannot carry, and the path to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not _fits(item):
                return _culprit(item, f"{path}[{key!r}]")
        for key in value:
            if not isinstance(key, str | int | float | bool | type(None)):
                return f"a key of {path}", key
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if not _fits(item):
                return _culprit(item, f"{path}[{index}]")
    return path, value


def _fits(value: Any) -> bool:
    try:
        _ENCODER.encode(value)
    except (TypeError, ValueError, EncodeError, RecursionError):
        return False
    return True
