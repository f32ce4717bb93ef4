"""Checks of what callers give: an error names the option, the value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from llmtasks.errors import InvalidOptionError, InvalidTriggerError
from llmtasks.triggers import Once

#: What only the ledger can do.
NEEDS_LEDGER: Final = (
    "max_instances", "unique", "interval_minutes", "schedule", "on_failure", "on_success", "redact",
)  # fmt: skip


def check_text(option: str, value: object, expected: str) -> None:
    """Check that ``value`` is a text that fits the ledger's columns.

    Raises:
        InvalidOptionError: It is not.
    """
    if not isinstance(value, str) or not value or len(value) > 200 or "\0" in value:
        raise InvalidOptionError(option, value, expected)


def check_number(option: str, value: object, *, above: float | None = None, least: float | None = None) -> None:
    """Check that ``value`` is None or a finite number in range.

    Raises:
        InvalidOptionError: It is not.
    """
    expected = f"a number above {above}" if above is not None else f"a number from {least}"
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidOptionError(option, value, expected)
    if (above is not None and value <= above) or (least is not None and value < least):
        raise InvalidOptionError(option, value, expected)


def check_whole(option: str, value: object, least: int, most: int | None) -> None:
    """Check that ``value`` is None or a whole number in range.

    Raises:
        InvalidOptionError: It is not.
    """
    if value is None:
        return
    good = isinstance(value, int) and not isinstance(value, bool)
    if not good or value < least or (most is not None and value > most):  # type: ignore[operator]  # good says it is an int
        between = f"a whole number from {least} to {most}" if most is not None else f"a whole number from {least}"
        hint = "1 runs first, 10 last." if option == "priority" else ""
        raise InvalidOptionError(option, value, between, hint)


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Check that ``value`` is None or one of ``choices``.

    Raises:
        InvalidOptionError: It is not.
    """
    known = [str(item) for item in choices]
    if value is not None and value not in known:
        raise InvalidOptionError(option, value, f"one of {', '.join(map(repr, known))}")


def instant_of(option: str, value: object) -> datetime:
    """A datetime in UTC; a naive one is the machine's local time, which is what ``datetime.now()`` gives.

    Raises:
        InvalidTriggerError: It is no datetime, or outside the calendar.
    """
    if not isinstance(value, datetime):
        raise InvalidTriggerError(f"{option}={value!r}: expected a datetime, such as datetime.now()")
    try:
        return Once(value).at
    except InvalidTriggerError as error:
        raise InvalidTriggerError(str(error).replace("at=", f"{option}=", 1)) from None


def check_ledger(values: Mapping[str, Any]) -> None:
    """Check that nothing is asked for that only the ledger can do where it is off.

    Raises:
        InvalidOptionError: Something is; it names both options.
    """
    if values["ledger"] not in ("on", "off"):
        raise InvalidOptionError("ledger", values["ledger"], "'on' or 'off'")
    for name in NEEDS_LEDGER:
        if values["ledger"] == "off" and values[name]:
            raise InvalidOptionError(
                "ledger", "off", f"'on' together with {name}={values[name]!r}", f"Only the ledger keeps {name}."
            )
