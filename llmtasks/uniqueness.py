"""Uniqueness: which runs of a function are the same, which of them count, and what becomes of another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from llmtasks.checks import check_choice, check_number
from llmtasks.errors import DuplicateRunError, InvalidOptionError
from llmtasks.policies import seconds_of
from llmtasks.states import ENDED, LIVE, RunState

#: Ends of runs that did their work, for good or ill: what was cancelled or skipped is not held against anybody.
_CALLED: Final = frozenset({RunState.SUCCEEDED, RunState.FAILED})
#: Options that mean nothing without ``unique``.
_DEPENDENT: Final = ("unique_for", "unique_states", "on_duplicate")


class Duplicate(StrEnum):
    """What becomes of a run that would be the same as one that counts."""

    #: The run that is there is given to whoever asked for another.
    RETURN = "return"
    #: The run that is there is cancelled, and the new one is accepted.
    REPLACE = "replace"
    #: Whoever asked gets an error.
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class UniqueRule:
    """What the options of a unique function say."""

    #: The parameters that are compared; None compares all.
    parameters: tuple[str, ...] | None
    states: frozenset[RunState]
    #: How long a run counts from when it was accepted on, although it has ended.
    period: timedelta | None
    on_duplicate: Duplicate


@dataclass(frozen=True, slots=True, kw_only=True)
class Unique:
    """What one run must be the only one in."""

    #: The same for the same app, function and arguments, and for no others.
    key: str
    rule: UniqueRule

    def counts(self, state: RunState, accepted_at: datetime, now: datetime) -> bool:
        """Whether another run with this key is in the way."""
        if state in self.rule.states:
            return True
        recent = self.rule.period is not None and now - accepted_at < self.rule.period
        return recent and (state in _CALLED or state in LIVE)


def rule_of(values: Mapping[str, Any]) -> UniqueRule | None:
    """The rule that options name; None where they ask for no uniqueness.

    Raises:
        InvalidOptionError: A value is wrong; it names the option, the value and what was expected.
    """
    unique, period, states, on_duplicate = (values.get(name) for name in ("unique", *_DEPENDENT))
    parameters = _parameters_of(unique)
    check_choice("on_duplicate", on_duplicate, Duplicate)
    if unique is False or unique is None:
        for name in _DEPENDENT:
            if values.get(name) is not None:
                raise InvalidOptionError(name, values[name], "a value only together with unique")
        return None
    choice = Duplicate(on_duplicate or Duplicate.RETURN)
    if period is not None and choice is Duplicate.REPLACE:
        raise InvalidOptionError(
            "unique_for", period, "None together with on_duplicate='replace'", "What has ended cannot be replaced."
        )
    return UniqueRule(parameters=parameters, states=_states_of(states), period=_period_of(period), on_duplicate=choice)


def _parameters_of(unique: object) -> tuple[str, ...] | None:
    if unique is None or isinstance(unique, bool):
        return None
    named = [unique] if isinstance(unique, str) else unique
    if not isinstance(named, list | tuple) or not named or not all(isinstance(name, str) and name for name in named):
        raise InvalidOptionError("unique", unique, "True, the name of a parameter, or a tuple of such names")
    return tuple(sorted(set(named)))


def _states_of(states: object) -> frozenset[RunState]:
    if states is None:
        return LIVE
    live = {str(state) for state in LIVE}
    if not isinstance(states, list | tuple | set | frozenset) or not states or not live.issuperset(map(str, states)):
        hint = "unique_for is for runs that have ended." if _names_ends(states) else ""
        raise InvalidOptionError("unique_states", states, f"a tuple of {', '.join(map(repr, sorted(live)))}", hint)
    return frozenset(RunState(str(state)) for state in states)


def _names_ends(states: object) -> bool:
    return isinstance(states, list | tuple | set | frozenset) and bool({str(state) for state in states} & set(ENDED))


def _period_of(period: Any) -> timedelta | None:
    seconds = seconds_of(period)
    check_number("unique_for", seconds, above=0)
    try:
        return None if seconds is None else timedelta(seconds=seconds)
    except OverflowError:
        raise InvalidOptionError("unique_for", period, "a number of seconds well below a million years") from None


def duplicate_reason(run_id: str, state: RunState) -> str:
    """Why a run is left out that would be the same as this one."""
    return f"duplicate: the function is unique, and run {run_id} is {state}"


def replaced_reason(successor: str) -> str:
    """Why a run is cancelled whose place another takes."""
    return f"replaced: run {successor} takes its place"


def refusal(func_name: str, run_id: str, state: RunState) -> DuplicateRunError:
    """The error of a function that refuses a second run."""
    advice = "ask again later" if state in ENDED else f"wait for it, or cancel it with `llmtasks cancel {run_id}`"
    return DuplicateRunError(
        f"{func_name!r} is unique and refuses another run like {run_id}, which is {state}: {advice}",
        run_id=run_id,
        state=state,
    )
