"""What registering takes and gives, as types: options, and tasks with their function's own signature."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypedDict, TypeVar, overload

from llmtasks.store.runs import Run

if TYPE_CHECKING:
    from celery.canvas import Signature
    from celery.result import EagerResult

    from llmtasks.result import RunResult

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class RegisterOptions(TypedDict, total=False):
    """Keywords of ``register`` beside ``name``, ``config`` and ``bind``; ``TaskOptions`` says what they mean."""

    interval_minutes: float | None
    schedule: str | None
    timezone: str | None
    max_retries: int | None
    retry_delay: float | None
    retry_backoff: bool
    timeout: float | None
    priority: int
    max_instances: int | None
    max_concurrency: int | None
    overlap: Literal["skip", "queue_one", "allow", "cancel_running"]
    misfire: Literal["once", "skip", "all"]
    misfire_grace: float
    misfire_window: float | timedelta | None
    starts_at: datetime | None
    ends_at: datetime | None
    max_runs: int | None
    jitter_seconds: float | None
    unique: bool | str | Sequence[str]
    unique_for: float | timedelta | None
    unique_states: Iterable[Literal["pending", "queued", "waiting", "running", "retrying"]] | None
    on_duplicate: Literal["return", "replace", "refuse"] | None
    queue: str | None
    on_failure: Callable[[Run, Any], object] | None
    on_success: Callable[[Run, Any], object] | None
    redact: Iterable[str]
    ledger: Literal["on", "off"]
    # Celery's own task options.
    acks_late: Literal[True]
    autoretry_for: tuple[type[BaseException], ...]
    compression: str | None
    dont_autoretry_for: tuple[type[BaseException], ...]
    expires: Any
    ignore_result: bool
    pydantic: bool
    pydantic_context: Mapping[str, Any] | None
    pydantic_dump_kwargs: Mapping[str, Any] | None
    pydantic_strict: bool
    rate_limit: str | float | None
    resultrepr_maxsize: int
    retry_backoff_max: float
    retry_jitter: bool
    retry_kwargs: Mapping[str, Any]
    send_events: bool
    serializer: Literal["json"]
    soft_time_limit: float | None
    store_errors_even_if_ignored: bool
    throws: tuple[type[BaseException], ...]
    time_limit: float | None
    track_started: bool
    trail: bool
    typing: bool


class Sendable(Protocol[P, R_co]):
    """What sending has in common for sync and async functions."""

    name: str

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> RunResult[R_co]:
        """Send a run to the broker."""
        ...

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> RunResult[R_co]:
        """Send a run to the broker without blocking the event loop."""
        ...

    def map_delay(self, items: Iterable[Any], **options: Any) -> Sequence[RunResult[R_co]]:
        """Send one run for each item: a tuple of arguments, a dict of keyword arguments, or the only argument.

        ``options`` are those of ``apply_async``, for all runs alike.
        """
        ...

    def apply_async(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> RunResult[R_co]:
        """Send a run with Celery's options; ``priority`` is 1 (first) to 10."""
        ...

    def apply(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> EagerResult[R_co]:
        """Run the function here, as Celery's eager mode does; outside the ledger."""
        ...

    def s(self, *args: Any, **kwargs: Any) -> Signature[Any]:
        """A signature, for Celery's canvas."""
        ...

    def si(self, *args: Any, **kwargs: Any) -> Signature[Any]:
        """An immutable signature, for Celery's canvas."""
        ...

    def signature(self, *args: Any, **kwargs: Any) -> Signature[Any]:
        """A signature with options, for Celery's canvas."""
        ...


class RegisteredTask(Sendable[P, R_co], Protocol[P, R_co]):
    """A Celery task whose signature is the sync function's own."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run the function's body here, outside the ledger."""
        ...


class RegisteredAsyncTask(Sendable[P, R_co], Protocol[P, R_co]):
    """A Celery task whose signature is the async function's own."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]:
        """Run the function's body here, outside the ledger; to be awaited."""
        ...


# A coroutine function is a function too: the overloads overlap, and the first that fits is meant.


class TaskDecorator(Protocol):
    """What ``register(...)`` returns."""

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> RegisteredAsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> RegisteredTask[P, R]: ...


class BoundTaskDecorator(Protocol):
    """What ``register(bind=True, ...)`` returns: the function's ``self`` is given by Celery."""

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /
    ) -> RegisteredAsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> RegisteredTask[P, R]: ...
