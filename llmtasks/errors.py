"""Every error that llmtasks raises, as one tree.

    LLMTasksError
    ├── ConfigurationError
    │   ├── InvalidOptionError (ValueError)
    │   ├── InvalidTriggerError (ValueError)
    │   ├── DuplicateTaskError
    │   └── SchemaOutdatedError
    ├── NotFoundError (LookupError)
    │   ├── UnknownTaskFunctionError
    │   ├── TaskNotFoundError
    │   └── RunNotFoundError
    ├── InvalidParamsError (TypeError)
    ├── ForbiddenTransitionError
    ├── DuplicateRunError
    └── UnavailableError
        ├── BrokerUnavailableError
        └── DatabaseUnavailableError

Each message says what was wrong, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class LLMTasksError(Exception):
    """Anything that llmtasks itself raises."""

    #: Of an error of ``map_delay``: the handles of the runs that were sent before.
    sent: Sequence[Any] = ()


class ConfigurationError(LLMTasksError):
    """A setting, an option or the environment is wrong."""


class InvalidOptionError(ConfigurationError, ValueError):
    """An option has a value that it cannot have.

    Args:
        option: The option's name as the caller wrote it.
        value: What was given.
        expected: What would be right, as a noun phrase.
        hint: What to do, as a sentence; optional.
    """

    def __init__(self, option: str, value: object, expected: str, hint: str = "") -> None:
        self.option = option
        self.value = value
        super().__init__(f"{option}={value!r}: expected {expected}" + (f". {hint}" if hint else ""))


class InvalidTriggerError(ConfigurationError, ValueError):
    """A trigger is not readable, contradicts itself, or never fires."""


class DuplicateTaskError(ConfigurationError):
    """Two different functions or schedules were registered under one name."""


class SchemaOutdatedError(ConfigurationError):
    """The database's tables are not those that this version needs."""


class NotFoundError(LLMTasksError, LookupError):
    """Something that was asked for by name or id does not exist."""

    def __str__(self) -> str:
        # LookupError's children may quote their message; ours are sentences.
        return str(self.args[0]) if self.args else ""


class UnknownTaskFunctionError(NotFoundError):
    """No task function has this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        known = sorted(known)
        near = nearest(name, known)
        if near:
            advice = f"did you mean {' or '.join(repr(item) for item in near)}?"
        elif known:
            advice = f"registered are {', '.join(repr(item) for item in known[:10])}{'...' if len(known) > 10 else ''}"
        else:
            advice = "none is registered: import the module that registers it first"
        super().__init__(f"no task function is registered as {name!r}; {advice}")


class TaskNotFoundError(NotFoundError):
    """No Task has this id or name."""


class RunNotFoundError(NotFoundError):
    """No run has this id."""


class InvalidParamsError(LLMTasksError, TypeError):
    """Arguments do not fit the function's signature, or JSON cannot carry them."""


class ForbiddenTransitionError(LLMTasksError):
    """A Task or a run is in a state from which the wished one cannot be reached."""


class DuplicateRunError(LLMTasksError):
    """A unique function has a run already that counts, and was registered to refuse another.

    Args:
        message: What Celery keeps of an error is its message.
        run_id: The run that is there.
        state: The state that it is in.
    """

    def __init__(self, message: str, run_id: str = "", state: str = "") -> None:
        self.run_id = run_id
        self.state = state
        super().__init__(message)


class UnavailableError(LLMTasksError):
    """A server that is needed does not answer."""


class BrokerUnavailableError(UnavailableError):
    """The message broker does not answer."""


class DatabaseUnavailableError(UnavailableError):
    """The database does not answer."""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The up to three of ``known`` that look most like ``name``, best first."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
