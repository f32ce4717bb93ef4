"""Backfill: runs for instants of a schedule that went by without one."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import islice
from typing import Final

from llmtasks.checks import check_whole, instant_of
from llmtasks.dispatch import Station, run_of, send
from llmtasks.errors import InvalidOptionError
from llmtasks.registry import task_registry
from llmtasks.store import outbox, runs, uncovered, uniqueness
from llmtasks.store.runs import NewRun, Run
from llmtasks.store.schedules import Schedule
from llmtasks.triggers import Interval, Trigger, instants
from llmtasks.uniqueness import duplicate_reason

#: Runs that one call opens at most, where nobody says more.
DEFAULT_LIMIT: Final = 1_000
#: Instants that are looked at, at most: a minute's schedule of two months.
MOST_INSTANTS: Final = 100_000
#: Runs of one transaction; each is complete in itself, so that a call that died halfway can be repeated.
SLICE: Final = 500
_TICK: Final = timedelta(microseconds=1)


def missing(at: Station, schedule: Schedule, start: object, end: object, limit: int | None) -> list[NewRun]:
    """The runs that a backfill of the instants from ``start`` to ``end``, both included, would open, earliest first.

    An instant has its run where a row says so; one that a policy skipped has none. Instants outside the schedule's
    ``starts_at`` and ``ends_at`` are none of its; an interval's grid goes back before its first run.

    Raises:
        InvalidTriggerError: ``start`` or ``end`` is no datetime.
        InvalidOptionError: They are the wrong way round or in the future, or there are more runs than ``limit``.
    """
    check_whole("limit", limit, 1, MOST_INSTANTS)
    most = DEFAULT_LIMIT if limit is None else limit
    begin, until, now = instant_of("start", start), instant_of("end", end), at.database.now()
    if begin > until:
        raise InvalidOptionError("start", begin.isoformat(), f"an instant not after end, {until.isoformat()}")
    if until > now:
        raise InvalidOptionError(
            "end", until.isoformat(), f"an instant not after now ({now.isoformat()})", "Beat runs what is to come."
        )
    first = begin if schedule.starts_at is None else max(begin, schedule.starts_at)
    last = until if schedule.ends_at is None else min(until, schedule.ends_at)
    named = instants(_reaching_back(schedule.trigger, first), first - _TICK, last)
    wanted = list(islice(named, MOST_INSTANTS + 1))
    if len(wanted) > MOST_INSTANTS:
        raise _too_many(schedule, f"fewer than {MOST_INSTANTS:,} instants in what is backfilled", most)
    with at.database.reading() as connection:
        covered = uncovered.covered(connection, schedule.id, first, last)
        left_out = uncovered.skipped(connection, schedule.id, first, last)
    opened = [item for item in wanted if item not in covered]
    if len(opened) > most:
        raise _too_many(schedule, f"at least {len(opened):,}, as many runs as this would open", most)
    why = f"backfill {begin.isoformat()} to {until.isoformat()}"
    reasons = {item: f"{why}; before: {left_out[item]}" if item in left_out else why for item in opened}
    unique = task_registry.unique_of(schedule)
    return [
        run_of(schedule, scheduled_for=item, backfilled=True, reason=reasons[item], unique=unique) for item in opened
    ]


def open_all(at: Station, new: list[NewRun]) -> list[Run]:
    """Open these runs and send their messages; returns those that are new, as the ledger has them.

    Of a unique function one run is opened; the other instants are skipped, and a later backfill opens the next.
    """
    found: list[Run] = []
    for begin in range(0, len(new), SLICE):
        part, now = new[begin : begin + SLICE], at.database.now()
        with at.database.transaction() as tx:
            uncovered.forget(tx, part)
            opened = [uniqueness.open_run(tx, item, now, refuses=False) for item in part]
            ids = [item.run.id for item in opened if item.is_new]
            both = zip(part, opened, strict=True)
            runs.record_skipped(tx, [_duplicate(item, of.run) for item, of in both if of.is_duplicate], now)
            messages = outbox.take_these(tx, ids, now + timedelta(seconds=at.settings.outbox_patience)) if ids else []
            found += runs.get_many(tx, ids)
        send(at, messages)
    return found


def _duplicate(new: NewRun, original: Run) -> NewRun:
    return replace(new, reason=duplicate_reason(original.id, original.state))


def _reaching_back(trigger: Trigger, first: datetime) -> Trigger:
    """The trigger; an interval with its grid extended to ``first``."""
    if not isinstance(trigger, Interval) or first >= trigger.anchor:
        return trigger
    steps = (trigger.anchor - first) // trigger.every
    return Interval(trigger.every, trigger.anchor - steps * trigger.every)


def _too_many(schedule: Schedule, expected: str, limit: int) -> InvalidOptionError:
    hint = f"Backfill a shorter time of {schedule.name!r}, or raise limit up to {MOST_INSTANTS:,}."
    return InvalidOptionError("limit", limit, expected, hint)
