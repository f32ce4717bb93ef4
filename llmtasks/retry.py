"""Waiting longer after each failure: the arithmetic, and a decorator that retries inside one attempt."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast, overload

from llmtasks.errors import InvalidOptionError

if TYPE_CHECKING:
    from tenacity import RetryCallState

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


class RetryDecorator(Protocol):
    """Wraps a function and keeps its signature, sync or async."""

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]:
        """Give ``function`` its retries."""
        ...


def backoff_delay(attempt: int, *, base: float = 1.0, cap: float = 300.0) -> float:
    """Draw the seconds to wait after failed attempt ``attempt`` (1, 2, ...): exponential, full jitter.

    Full jitter spreads callers that failed together over the whole wait
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Raises:
        InvalidOptionError: ``attempt`` is below 1.
    """
    if attempt < 1:
        raise InvalidOptionError("attempt", attempt, "1 for the first attempt, 2 for the second, and so on")
    # Without the inner min, 2 ** attempt overflows a float past attempt 1024.
    return random.uniform(0, min(cap, base * 2 ** min(attempt - 1, 32)))


@overload
def retry_with_backoff(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def retry_with_backoff(
    *,
    max_retries: int = ...,
    base_delay: float = ...,
    max_delay: float = ...,
    retry_on: type[Exception] | tuple[type[Exception], ...] = ...,
) -> RetryDecorator: ...
def retry_with_backoff(
    function: Callable[..., Any] | None = None,
    /,
    *,
    max_retries: int = 3,
    base_delay: float = 1.0,
    max_delay: float = 60.0,
    retry_on: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Callable[..., Any]:
    """Call a function again when it fails, after exponentially growing waits with full jitter.

    The retries happen inside the call: within one attempt of a run, with its timeout running. Works on sync and async
    functions, with or without Celery, bare or with options. When nothing is left to try, the last error is raised
    itself. Cancellation and what Celery steers tasks by (``Retry``, ``Ignore``, ``Reject``, the time limits) pass
    through at once.

    Args:
        function: The function, where the decorator is used bare.
        max_retries: Calls after the first; 3 means at most four calls.
        base_delay: The longest wait, in seconds, before the second call; it doubles with each further one.
        max_delay: What no wait exceeds, in seconds.
        retry_on: The error or errors worth another call.

    Raises:
        InvalidOptionError: An option is out of range, or the function cannot be retried, such as a generator.
    """
    policy = _Policy(max_retries=max_retries, base_delay=base_delay, max_delay=max_delay, retry_on=retry_on)
    return policy.wrap if function is None else policy.wrap(function)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Policy:
    max_retries: int
    base_delay: float
    max_delay: float
    retry_on: type[Exception] | tuple[type[Exception], ...]

    def __post_init__(self) -> None:
        if type(self.max_retries) is not int or self.max_retries < 0:
            raise InvalidOptionError("max_retries", self.max_retries, "a whole number, 0 or more")
        for option in ("base_delay", "max_delay"):
            seconds = getattr(self, option)
            if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
                raise InvalidOptionError(option, seconds, "a number of seconds, 0 or more")
        if self.max_delay < self.base_delay:
            raise InvalidOptionError("max_delay", self.max_delay, f"at least base_delay, which is {self.base_delay}")
        errors: object = self.retry_on
        classes = cast("tuple[object, ...]", errors) if isinstance(errors, tuple) else (errors,)
        if not classes or not all(isinstance(item, type) and issubclass(item, Exception) for item in classes):
            hint = "Cancellation and exits, which are no Exception, are never retried"
            raise InvalidOptionError("retry_on", errors, "an Exception class or a tuple of them", hint)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Give ``function`` its retries."""
        _check_function(function)
        # Here and not above: tenacity takes 0.1 s to import (it loads Tornado where that is installed), which only who
        # retries should pay.
        from celery.exceptions import SoftTimeLimitExceeded, TaskPredicate, Terminated, TimeLimitExceeded
        from tenacity import AsyncRetrying, Retrying, retry_if_exception, stop_after_attempt

        steering = (TaskPredicate, SoftTimeLimitExceeded, TimeLimitExceeded, Terminated)
        # Each call takes a copy of these, because an engine keeps the state of one call.
        engine = Retrying(
            stop=stop_after_attempt(self.max_retries + 1),
            wait=lambda state: backoff_delay(state.attempt_number, base=self.base_delay, cap=self.max_delay),
            retry=retry_if_exception(
                lambda error: isinstance(error, self.retry_on) and not isinstance(error, steering)
            ),
            before_sleep=functools.partial(_log, function),
            reraise=True,
        )
        waiting = AsyncRetrying(
            stop=engine.stop, wait=engine.wait, retry=engine.retry, before_sleep=engine.before_sleep, reraise=True
        )

        if inspect.iscoroutinefunction(_plain(function)):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                return await waiting.copy()(function, *args, **kwargs)

            return call_async

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = engine.copy()(function, *args, **kwargs)
            return again(result, *args, **kwargs) if inspect.isawaitable(result) else result

        async def again(first: Awaitable[Any], *args: Any, **kwargs: Any) -> Any:
            # A plain function that returns an awaitable fails where that is awaited, and then has to be called anew.
            pending = [first]

            async def attempt() -> Any:
                return await (pending.pop() if pending else function(*args, **kwargs))

            return await waiting.copy()(attempt)

        return call


def _check_function(function: Any) -> None:
    plain = _plain(function)
    if isinstance(function, staticmethod | classmethod):
        hint = f"Put @retry_with_backoff below @{type(function).__name__}"
        raise InvalidOptionError("function", function, "a function", hint)
    if isinstance(function, type) or not callable(function):
        hint = "Options need their names: retry_with_backoff(max_retries=5)"
        raise InvalidOptionError("function", function, "a function", hint)
    if inspect.isasyncgenfunction(plain) or inspect.isgeneratorfunction(plain):
        hint = "A generator fails while it is iterated, after the call: retry what it calls for each item instead"
        raise InvalidOptionError("function", function, "a function that returns its result, not a generator", hint)


def _plain(function: Any) -> Any:
    """What tells whether a callable is async or a generator: itself, inside its ``partial``, or its ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004


def _log(function: Callable[..., Any], state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.warning(
        "call failed, trying again",
        extra={
            "function": getattr(function, "__qualname__", repr(function)),
            "attempt": state.attempt_number,
            "delay": state.upcoming_sleep,
            "error": repr(error),
        },
    )
