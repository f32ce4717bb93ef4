"""Waiting for a condition, so that no test has to sleep and hope."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout: float = 30, message: str = "", *, interval: float = 0.05) -> T:
    """Call ``condition`` until what it returns is true, and return that.

    Args:
        condition: Looked at every ``interval`` seconds. What it raises is not caught.
        timeout: Seconds. Generous on purpose: it bounds a failure, it does not time a success.
        message: What is waited for, for the report of a failure.
        interval: Seconds between two looks.

    Raises:
        AssertionError: Still not true after ``timeout``; says what the condition returned last.
    """
    deadline = time.monotonic() + timeout
    while True:
        late = time.monotonic() > deadline
        value = condition()
        if value:
            return value
        if late:
            raise AssertionError(f"not within {timeout:g} s: {message or 'the condition'}; last seen: {value!r}")
        time.sleep(interval)
