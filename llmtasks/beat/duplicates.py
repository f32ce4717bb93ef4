"""Duplicates: which of a schedule's due instants may run beside what others asked for of a unique function. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from llmtasks.beat.overlap import Decided
from llmtasks.states import RunState
from llmtasks.store import uniqueness
from llmtasks.store.keys import Holder
from llmtasks.uniqueness import Duplicate, Unique, duplicate_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimant:
    """What a schedule's runs must be the only ones in, and the run that has it."""

    unique: Unique
    holder: Holder | None


def decide(decided: Decided, claimant: Claimant | None, now: datetime) -> tuple[Decided, str | None]:
    """Leave one run at most of those that the overlap policy would open: all runs of a schedule have its arguments.

    The first of them runs where nothing is in the way; with "replace" the last one runs in any case. Where none does,
    nothing is cancelled for it either.

    Returns:
        What is left, and the id of the run that it replaces.
    """
    if claimant is None or not decided.opened:
        return decided, None
    unique, holder = claimant.unique, claimant.holder
    in_the_way = holder if uniqueness.in_the_way(unique, holder, now) else None
    replaces = unique.rule.on_duplicate is Duplicate.REPLACE
    if in_the_way is not None and not replaces:
        why = duplicate_reason(in_the_way.run_id, in_the_way.state)
        left_out = [replace(item, reason=why) for item in decided.opened]
        return Decided(opened=[], skipped=[*decided.skipped, *left_out]), None
    chosen = decided.opened[-1] if replaces else decided.opened[0]
    why = duplicate_reason(chosen.id, RunState.PENDING)
    left_out = [replace(item, reason=why) for item in decided.opened if item is not chosen]
    found = replace(decided, opened=[chosen], skipped=[*decided.skipped, *left_out])
    return found, None if in_the_way is None else in_the_way.run_id
