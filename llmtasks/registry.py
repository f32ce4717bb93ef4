"""TaskRegistry: a function and its options become a typed Celery task. Registering does no I/O."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast, overload

from celery import shared_task
from celery.utils.functional import head_from_fun

from llmtasks.bridge import name_of
from llmtasks.errors import (
    ConfigurationError,
    DuplicateTaskError,
    InvalidOptionError,
    InvalidTriggerError,
    UnknownTaskFunctionError,
)
from llmtasks.options import TaskOptions
from llmtasks.run_task import RunTask, body_of
from llmtasks.store.runs import Run
from llmtasks.triggers import Cron

if TYPE_CHECKING:
    from celery.canvas import Signature
    from celery.result import AsyncResult

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

#: on_failure and on_success: (run, error or result), sync or async.
Callback = Callable[[Any, Any], Any]


class _Sendable(Protocol[P, R_co]):
    """What sending has in common for sync and async functions."""

    name: str

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R_co]:
        """Send a run to the broker."""
        ...

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R_co]:
        """Send a run to the broker without blocking the event loop."""
        ...

    def map_delay(self, items: Iterable[Any]) -> list[AsyncResult[R_co]]:
        """Send one run for each item: a tuple of arguments, a dict of keyword arguments, or the only argument."""
        ...

    def apply_async(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[R_co]:
        """Send a run with Celery's options; ``priority`` is 1 (first) to 10."""
        ...

    def s(self, *args: Any, **kwargs: Any) -> Signature[R_co]:
        """A signature, for Celery's canvas."""
        ...

    def si(self, *args: Any, **kwargs: Any) -> Signature[R_co]:
        """An immutable signature, for Celery's canvas."""
        ...


class RegisteredTask(_Sendable[P, R_co], Protocol[P, R_co]):
    """A Celery task whose signature is the sync function's own."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run the function's body here, outside the ledger."""
        ...


class RegisteredAsyncTask(_Sendable[P, R_co], Protocol[P, R_co]):
    """A Celery task whose signature is the async function's own."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]:
        """Run the function's body here, outside the ledger; to be awaited."""
        ...


class TaskDecorator(Protocol):
    """What ``register(...)`` returns."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> RegisteredAsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> RegisteredTask[P, R]: ...


class TaskRegistry:
    """The task functions of this process by name."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[..., Any]] = {}
        self._options: dict[str, TaskOptions] = {}

    @overload
    def register(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> RegisteredAsyncTask[P, R]: ...
    @overload
    def register(self, function: Callable[P, R], /) -> RegisteredTask[P, R]: ...
    @overload
    def register(
        self,
        *,
        name: str | None = None,
        interval_minutes: float | None = None,
        schedule: str | None = None,
        timezone: str | None = None,
        max_retries: int | None = None,
        retry_delay: float | None = None,
        retry_backoff: bool = False,
        timeout: float | None = None,
        priority: int = ...,
        max_instances: int | None = None,
        misfire: str = ...,
        misfire_grace: float = ...,
        queue: str | None = None,
        on_failure: Callable[[Run, Any], Awaitable[Any] | Any] | None = None,
        on_success: Callable[[Run, Any], Awaitable[Any] | Any] | None = None,
        redact: Iterable[str] = (),
        config: Mapping[str, Any] | None = None,
        **celery: Any,
    ) -> TaskDecorator: ...

    def register(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Make a function a task: ``@task_registry.register`` or ``@task_registry.register(name=..., ...)``.

        Args:
            function: The function, where the decorator is used bare.
            name: The task function's name; defaults to the function's own.
            config: Options as a mapping, the same keys as the keywords.
            **options: See ``TaskOptions``; Celery's own task options go through to Celery.

        Returns:
            A Celery task with the function's signature, or a decorator that makes one.

        Raises:
            InvalidOptionError: An option is unknown, given twice, or has a value that it cannot have.
            InvalidTriggerError: ``schedule`` is not a cron expression, or the zone is unknown.
            DuplicateTaskError: Another function has this name.
        """
        if function is not None:
            return self._add(function, name, options, config)

        def decorate(function: Callable[..., Any], /) -> Any:
            return self._add(function, name, options, config)

        return decorate

    def names(self) -> list[str]:
        """The names of all task functions, sorted."""
        return sorted(self._functions)

    def options(self, name: str) -> TaskOptions:
        """The options of a task function.

        Raises:
            UnknownTaskFunctionError: None has this name; the error names the nearest ones.
        """
        self._check_known(name)
        return self._options[name]

    def function(self, name: str) -> Callable[..., Any]:
        """The function behind a name. Raises as ``options`` does."""
        self._check_known(name)
        return self._functions[name]

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def _check_known(self, name: str) -> None:
        if name not in self._functions:
            raise UnknownTaskFunctionError(name, self._functions)

    def _add(
        self,
        function: Callable[..., Any],
        name: str | None,
        keywords: Mapping[str, Any],
        config: Mapping[str, Any] | None,
    ) -> Any:
        if not callable(function) or inspect.isclass(function):
            raise ConfigurationError(f"register({function!r}): expected a function; options are given by keyword")
        if inspect.isasyncgenfunction(function):
            raise ConfigurationError(
                f"task function {name_of(function)} is an async generator: nobody would iterate it; collect its items and return them"
            )
        options = TaskOptions.build(name or function.__name__, keywords, config)
        _check_trigger(options)
        _check_redact(function, options)
        known = self._functions.get(options.name)
        if known is not None and name_of(known) != name_of(function):
            raise DuplicateTaskError(
                f"two functions are registered as {options.name!r}: {name_of(known)} and {name_of(function)}; give one another name"
            )
        self._functions[options.name] = function
        self._options[options.name] = options
        return _celery_task(function, options)


def _celery_task(function: Callable[..., Any], options: TaskOptions) -> Any:
    """The function as a shared Celery task of class RunTask."""
    takes_self = bool(options.celery.get("bind"))
    parameters = tuple(inspect.signature(function).parameters)
    # The tracer runs the wrapper; Celery reads name, module and documentation off it as if it were the function.
    run = functools.wraps(function)(body_of(function))
    made = shared_task(
        base=RunTask,
        options=options,
        function=staticmethod(function),
        parameters=parameters[1:] if takes_self else parameters,
        takes_self=takes_self,
        __header__=staticmethod(head_from_fun(function, bound=takes_self)),
        **options.celery_options(),
    )(run)
    # At run time this is Celery's Proxy; the protocols say what it can do, with the function's own types.
    return cast("Any", made)


def _check_trigger(options: TaskOptions) -> None:
    if options.timezone is not None and options.schedule is None:
        raise InvalidOptionError("timezone", options.timezone, "a zone only together with schedule")
    if options.schedule is not None:
        try:
            Cron(options.schedule, options.timezone or "UTC")
        except InvalidTriggerError as error:
            raise InvalidTriggerError(f"task function {options.name!r}: {error}") from None


def _check_redact(function: Callable[..., Any], options: TaskOptions) -> None:
    parameters = inspect.signature(function).parameters
    takes_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    for name in options.redact:
        if name not in parameters and not takes_any:
            raise InvalidOptionError(
                "redact", name, f"a parameter of {options.name}: {', '.join(parameters) or 'it has none'}"
            )


#: The registry that applications use.
task_registry = TaskRegistry()
