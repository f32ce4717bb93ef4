"""Uniqueness: one run at a time for each key. Whoever has the key's row locked decides, all others wait for it.

A key names the run that was accepted last. Whether that still counts is read from the run's own row at the moment when
another one is asked for: an end frees the key by being an end, and no path to one has to know of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import Connection

from llmtasks.states import RunState
from llmtasks.store import keys, runs
from llmtasks.store import rows as tables
from llmtasks.store.cancelling import cancel_where
from llmtasks.store.keys import Holder
from llmtasks.store.runs import NewRun, Run
from llmtasks.uniqueness import Duplicate, Unique, duplicate_reason, refusal, replaced_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """What became of a run that somebody asked for."""

    #: The run, or the one that it is a duplicate of.
    run: Run
    is_new: bool
    is_duplicate: bool = False
    #: Runs that were cancelled for it; the caller tells the workers.
    cancelled: list[str] = field(default_factory=list)


def open_run(
    tx: Connection, new: NewRun, now: datetime, available_at: datetime | None = None, *, refuses: bool = True
) -> Accepted:
    """Record a run and leave its message in the outbox, unless it would be a duplicate.

    A run with the same id, or of the same instant of the same schedule, is left as it is. What ``replace`` takes the
    place of is cancelled: at once where nobody holds it, by a request to its owner where somebody does.

    Args:
        available_at: When its message may be sent; defaults to ``now``.
        refuses: Whether a duplicate may raise.

    Raises:
        DuplicateRunError: The function refuses a second run.
    """
    cancelled: list[str] = []
    if new.unique is not None:
        key, choice = new.unique.key, new.unique.rule.on_duplicate
        holder = keys.lock(tx, [key]).get(key)
        known = runs.get(tx, new.id)
        if known is not None:
            keys.drop_unnamed(tx, [key])
            return Accepted(run=known, is_new=False)
        if holder is not None and in_the_way(new.unique, holder, now):
            if choice is not Duplicate.REPLACE:
                found = runs.get(tx, holder.run_id)
                assert found is not None  # a purge takes its key first
                if refuses and choice is Duplicate.REFUSE:
                    raise refusal(new.func_name, found.id, found.state)
                return Accepted(run=found, is_new=False, is_duplicate=True)
            cancelled = replace(tx, {holder.run_id: replaced_reason(new.id)}, now)
        keys.give(tx, {key: new.id})
    is_new = runs.open_run(tx, new, now, available_at)
    run = runs.get(tx, new.id)
    assert run is not None
    return Accepted(run=run, is_new=is_new, cancelled=cancelled)


def record_duplicate(tx: Connection, new: NewRun, original: Run, now: datetime) -> None:
    """Record a duplicate whose id somebody knows: it is skipped, and Celery is to be told so."""
    reason = duplicate_reason(original.id, original.state)
    runs.record_untold(tx, dataclasses.replace(new, reason=reason), now, RunState.SKIPPED)


def in_the_way(unique: Unique, holder: Holder | None, now: datetime) -> bool:
    """Whether a key's run keeps another from being accepted."""
    return holder is not None and unique.counts(holder.state, holder.accepted_at, now)


def replace(tx: Connection, reasons: Mapping[str, str], now: datetime) -> list[str]:
    """Cancel runs whose place others take, by their ids; returns the ids of those that had not ended."""
    return cancel_where(tx, tables.runs.c.id.in_(list(reasons)), now, reasons) if reasons else []
