"""TaskRegistry: a function and its options become a typed Celery task. Registering does no I/O."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Unpack, overload

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
from llmtasks.identity import check_identity, unique_of
from llmtasks.off_ledger import OffLedgerTask
from llmtasks.options import TaskOptions
from llmtasks.registered import (
    BoundTaskDecorator,
    P,
    R,
    RegisteredAsyncTask,
    RegisteredTask,
    RegisterOptions,
    TaskDecorator,
)
from llmtasks.run_task import RunTask, body_of
from llmtasks.store.schedules import Schedule
from llmtasks.triggers import Cron, Interval
from llmtasks.uniqueness import Unique

#: Any instant: only shows whether an interval is one.
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
#: Celery's functions, which have no types.
_head_from_fun: Any = head_from_fun
_shared_task: Any = shared_task


class TaskRegistry:
    """The task functions of this process by name."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[..., Any]] = {}
        self._options: dict[str, TaskOptions] = {}

    # A coroutine function is a function too: the overloads overlap, and the first that fits is meant.
    @overload
    def register(  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> RegisteredAsyncTask[P, R]: ...
    @overload
    def register(self, function: Callable[P, R], /) -> RegisteredTask[P, R]: ...
    @overload
    def register(
        self,
        /,
        *,
        bind: Literal[True],
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        **options: Unpack[RegisterOptions],
    ) -> BoundTaskDecorator: ...
    @overload
    def register(
        self,
        /,
        *,
        bind: Literal[False] = False,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        **options: Unpack[RegisterOptions],
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

    def unique(self, app: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Unique | None:
        """What a run of a task function must be the only one in; None where the function is not unique.

        Raises:
            InvalidParamsError: The arguments do not fit its signature.
        """
        self._check_known(name)
        return unique_of(app, self._options[name], self._functions[name], args, kwargs)

    def unique_of(self, schedule: Schedule) -> Unique | None:
        """The same for each run of a schedule; None where its function is not known here, or a plain Celery task."""
        if schedule.handed or schedule.func_name not in self:
            return None
        return self.unique(schedule.app, schedule.func_name, schedule.args, schedule.kwargs)

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
        given: object = function
        if not callable(given) or inspect.isclass(given):
            raise ConfigurationError(f"register({given!r}): expected a function; options are given by keyword")
        if inspect.isasyncgenfunction(function):
            raise ConfigurationError(
                f"task function {name_of(function)} is an async generator: nobody would iterate it; "
                "collect its items and return them"
            )
        options = TaskOptions.build(name or function.__name__, keywords, config)
        _check_trigger(options)
        _check_redact(function, options)
        check_identity(options, function)
        known = self._functions.get(options.name)
        if known is not None and name_of(known) != name_of(function):
            raise DuplicateTaskError(
                f"two functions are registered as {options.name!r}: {name_of(known)} and {name_of(function)}; "
                "give one another name"
            )
        self._functions[options.name] = function
        self._options[options.name] = options
        return _celery_task(function, options)


def _celery_task(function: Callable[..., Any], options: TaskOptions) -> Any:
    """The function as a shared Celery task of our class."""
    takes_self = bool(options.celery.get("bind"))
    parameters = tuple(inspect.signature(function).parameters)
    # The tracer runs the wrapper; Celery reads name, module and documentation off it as if it were the function.
    run = functools.wraps(function)(body_of(function))
    # At run time this is Celery's Proxy; the protocols say what it can do, with the function's own types.
    return _shared_task(
        base=OffLedgerTask if options.ledger == "off" else RunTask,
        options=options,
        function=staticmethod(function),
        parameters=parameters[1:] if takes_self else parameters,
        takes_self=takes_self,
        __header__=staticmethod(_head_from_fun(function, bound=takes_self)),
        **options.celery_options(),
    )(run)


def _check_trigger(options: TaskOptions) -> None:
    if options.timezone is not None and options.schedule is None:
        raise InvalidOptionError("timezone", options.timezone, "a zone only together with schedule")
    try:
        if options.schedule is not None:
            Cron(options.schedule, options.timezone or "UTC")
        if options.interval_minutes is not None:
            Interval(timedelta(minutes=options.interval_minutes), _EPOCH)
    except (InvalidTriggerError, OverflowError) as error:
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
