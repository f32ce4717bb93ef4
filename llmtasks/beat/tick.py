"""One tick: claim what is due, record its runs, move the schedules on, all in one transaction; then send."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final

from llmtasks.beat import duplicates, overlap
from llmtasks.beat.duplicates import Claimant
from llmtasks.dispatch import Station, run_of
from llmtasks.errors import InvalidParamsError, LLMTasksError
from llmtasks.message import Message
from llmtasks.policies import JITTERED, REACHED_END, Misfire, Policies, had_its_runs
from llmtasks.registry import task_registry
from llmtasks.states import RunState, ScheduleState
from llmtasks.store import keys, overlaps, runs, schedules, uniqueness
from llmtasks.store.keys import Holder
from llmtasks.store.overlaps import Unfinished
from llmtasks.store.runs import NewRun
from llmtasks.store.schedules import Advance, Schedule
from llmtasks.triggers import latest_at_or_before, latest_instants
from llmtasks.uniqueness import Unique, replaced_reason

logger = logging.getLogger(__name__)

#: Schedules that one transaction claims at most.
BATCH: Final = 500
#: Instants that misfire "all" runs at most.
ALL_LIMIT: Final = 1_000
#: What instants are counted in.
_TICK: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """What one due schedule leads to."""

    new: list[NewRun]
    skipped: list[NewRun]
    advance: Advance
    #: Why the schedule's unfinished runs are cancelled; None leaves them alone.
    cancels: str | None = None
    #: The run of the same unique function that the new one takes the place of.
    replaces: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """What one tick took. ``messages`` are to be sent by the caller, who has them reserved."""

    count: int
    messages: list[Message]
    #: The earliest next run of the app's schedules.
    following: datetime | None
    #: Runs that were cancelled; the caller tells the workers.
    cancelled: list[str] = field(default_factory=list)

    def pause(self, now: datetime) -> float:
        """Seconds until the next schedule is due."""
        return math.inf if self.following is None else max(0.0, (self.following - now).total_seconds())


def claim_due(at: Station, expected: datetime | None = None, limit: int = BATCH) -> Claimed:
    """Claim due schedules and record their runs.

    Args:
        at: Where.
        expected: When something is due, as the last tick knew it: once that has come, nobody is asked before.
        limit: Schedules that are claimed at most.

    Raises:
        DatabaseUnavailableError: Nothing was claimed.
    """
    now = at.database.now()
    if expected is None or expected > now:
        with at.database.reading() as connection:
            following = schedules.next_due(connection, at.name)
        if following is None or following > now:
            return Claimed(count=0, messages=[], following=following)
    with at.database.transaction() as tx:
        due = [_read(row) for row in schedules.due(tx, at.name, now, limit)]
        # Asked once these rows are locked: no other beat opens a run of theirs meanwhile.
        asking = [item.id for item in due if isinstance(item, Schedule) and overlap.asks(item)]
        unfinished = overlaps.unfinished(tx, asking)
        firings = _all_fired(tx, due, now, unfinished)
        cancels = {item.advance.schedule_id: item.cancels for item in firings if item.cancels is not None}
        new = [item for firing in firings for item in firing.new]
        opened = {item.id for item in new}
        replaced = {item.replaces: replaced_reason(item.new[0].id) for item in firings if item.replaces is not None}
        older = {run_id: why for run_id, why in replaced.items() if run_id not in opened}
        cancelled = overlaps.cancel_unfinished(tx, cancels, now, older)
        messages = runs.open_many(tx, new, now, now + timedelta(seconds=at.settings.outbox_patience))
        # Two schedules of one unique function may be due at once.
        cancelled += uniqueness.replace(tx, {run_id: replaced[run_id] for run_id in opened & replaced.keys()}, now)
        runs.record_skipped(tx, [item for firing in firings for item in firing.skipped], now)
        schedules.advance(tx, [firing.advance for firing in firings])
        following = schedules.next_due(tx, at.name)
    gone = set(cancelled)
    sendable = [item for item in messages if item.run_id not in gone]
    return Claimed(count=len(due), messages=sendable, following=following, cancelled=cancelled)


def _read(row: Any) -> Schedule | Firing:
    """A due row; one that cannot be read or run is set aside with its reason."""
    try:
        schedule = schedules.from_row(row)
        if not schedule.handed and schedule.func_name not in task_registry:
            raise LLMTasksError(f"no task function is registered as {schedule.func_name!r} where beat runs")
    except Exception as error:
        return _set_aside(row.id, row.name, ScheduleState(row.state), error)
    return schedule


def _all_fired(tx: Any, due: list[Schedule | Firing], now: datetime, unfinished: dict[str, Unfinished]) -> list[Firing]:
    """What the due schedules lead to, one after the other: two of one unique function may be due at once."""
    uniques = {item.id: found for item in due if isinstance(item, Schedule) and (found := _unique_of(item))}
    locked = {unique.key for unique in uniques.values()}
    holders = keys.lock(tx, locked)
    firings: list[Firing] = []
    for item in due:
        if isinstance(item, Firing):
            firings.append(item)
            continue
        unique = uniques.get(item.id)
        claimant = Claimant(unique=unique, holder=holders.get(unique.key)) if unique is not None else None
        firing = _firing_of(item, now, unfinished.get(item.id), claimant)
        if unique is not None and firing.new:
            holders[unique.key] = Holder(run_id=firing.new[0].id, state=RunState.PENDING, accepted_at=now)
            keys.give(tx, {unique.key: firing.new[0].id})
        firings.append(firing)
    keys.drop_unnamed(tx, locked)
    return firings


def _unique_of(schedule: Schedule) -> Unique | None:
    """What the schedule's runs must be the only ones in; arguments that do not fit any more fail as they always did."""
    try:
        return task_registry.unique_of(schedule)
    except InvalidParamsError:
        return None


def _firing_of(schedule: Schedule, now: datetime, unfinished: Unfinished | None, claimant: Claimant | None) -> Firing:
    try:
        return fire(schedule, now, unfinished, claimant)
    except Exception as error:
        return _set_aside(schedule.id, schedule.name, schedule.state, error)


def _set_aside(schedule_id: str, name: str, state: ScheduleState, error: Exception) -> Firing:
    known = isinstance(error, LLMTasksError)
    logger.error("schedule %s (%r) is set aside: %s", schedule_id, name, error, exc_info=None if known else error)
    move = Advance(schedule_id=schedule_id, next_at=None, last_at=None, to=state, why=f"set aside: {error}")
    return Firing(new=[], skipped=[], advance=move)


def fire(
    schedule: Schedule, now: datetime, unfinished: Unfinished | None = None, claimant: Claimant | None = None
) -> Firing:
    """The runs of a due schedule's instants up to ``now`` by its policies, and where it stands afterwards.

    Pure. Of several instants that are due at once only the latest can be on time, and it is within ``misfire_grace``.
    Misfire decides first which of them get a run, then overlap which of those may start, then whether the function is
    unique, then ``max_runs``.

    Args:
        unfinished: What the schedule has not finished, where its overlap policy asks for that.
        claimant: What its runs must be the only ones in, where its function is unique.
    """
    policies, trigger = Policies.of(schedule.options), schedule.trigger
    first, ends_at, left = schedule.next_run_at, schedule.ends_at, schedule.runs_left
    assert first is not None
    until = now if ends_at is None else min(now, ends_at)
    if left == 0:
        return Firing(new=[], skipped=[], advance=_advance(schedule, None, None, had_its_runs(schedule.options)))
    if first > until:
        return Firing(new=[], skipped=[], advance=_advance(schedule, None, None, REACHED_END))
    before = first - _TICK
    latest, count = latest_at_or_before(trigger, before, until)
    if latest is None:
        # The row's time is none of its trigger's instants: somebody asked for it, and it stands for itself.
        latest, count = first, 1
    wanted, missed = _by_misfire(schedule, policies, before, latest, count, now)
    decided = overlap.decide(schedule, policies, wanted, unfinished, now)
    decided, replaces = duplicates.decide(decided, claimant, now)
    new, skipped, cancels = decided.opened, [*missed, *decided.skipped], decided.cancels
    following, over = trigger.next_after(max(latest, now)), None
    if following is None or (ends_at is not None and following > ends_at):
        over = REACHED_END if schedule.is_periodic else "it fired" if new else "its instant was missed"
        following = None
    if left is not None and len(new) >= left:
        if len(new) > left:  # the run that others would be cancelled for is none
            cancels = None
        new, following, over = new[:left], None, over or had_its_runs(schedule.options)
        latest = new[-1].scheduled_for or latest
        skipped = [item for item in skipped if item.scheduled_for is not None and item.scheduled_for < latest]
    if policies.jitter:
        new = [_jittered(policies, item, now) for item in new]
    advance = replace(_advance(schedule, following, latest, over), fired_now=len(new))
    return Firing(new=new, skipped=skipped, advance=advance, cancels=cancels, replaces=replaces)


def _advance(schedule: Schedule, next_at: datetime | None, last_at: datetime | None, over: str | None) -> Advance:
    to = ScheduleState.ACTIVE if over is None else ScheduleState.COMPLETED
    return Advance(schedule_id=schedule.id, next_at=next_at, last_at=last_at, to=to, why=over)


def _by_misfire(
    schedule: Schedule, policies: Policies, before: datetime, latest: datetime, count: int, now: datetime
) -> tuple[list[NewRun], list[NewRun]]:
    """The runs that the misfire policy wants, earliest first, and the traces of instants that it leaves out."""
    missed = policies.is_missed(latest, now)
    if policies.misfire is Misfire.SKIP:
        if missed:
            return [], [_skipped(schedule, latest, count, now)]
        return [run_of(schedule, scheduled_for=latest)], _earlier(schedule, before, latest, now)
    if policies.misfire is Misfire.ALL and (count > 1 or policies.window is not None):
        return _each(schedule, policies, before, latest, now)
    reason = _late(now - latest) if missed else None
    if count > 1:
        reason = f"stands for {count} instants that nobody could dispatch in time"
    return [run_of(schedule, scheduled_for=latest, stands_for=count, reason=reason)], []


def _each(
    schedule: Schedule, policies: Policies, before: datetime, latest: datetime, now: datetime
) -> tuple[list[NewRun], list[NewRun]]:
    """A run for each of the latest instants that are on time or within the window."""
    since = before
    if policies.window is not None:
        since = max(before, now - max(policies.window, policies.grace) - _TICK)
    # An asked-for first run may be none of the trigger's instants.
    instants = latest_instants(schedule.trigger, since, latest, ALL_LIMIT) or [latest] * (latest > since)
    if not instants:
        return [], _earlier(schedule, before, latest + _TICK, now)
    # Only the latest is said to be on time: the others waited for a tick that did not come.
    reasons = [_late(now - item) for item in instants]
    if not policies.is_missed(latest, now):
        reasons[-1] = ""
    found = [
        run_of(schedule, scheduled_for=item, reason=why or None) for item, why in zip(instants, reasons, strict=True)
    ]
    return found, _earlier(schedule, before, instants[0], now)


def _earlier(schedule: Schedule, before: datetime, instant: datetime, now: datetime) -> list[NewRun]:
    """The trace of the instants after ``before`` and before ``instant``, none of which runs."""
    latest, count = latest_at_or_before(schedule.trigger, before, instant - _TICK)
    return [] if latest is None else [_skipped(schedule, latest, count, now)]


def _skipped(schedule: Schedule, instant: datetime, count: int, now: datetime) -> NewRun:
    policies = Policies.of(schedule.options)
    window = f" within {policies.window.total_seconds():g} s" if policies.window is not None else ""
    what = f"{count} instants missed, the latest" if count > 1 else "1 instant missed,"
    reason = f"misfire policy {policies.misfire}{window}: {what} {_late(now - instant)}"
    return run_of(schedule, scheduled_for=instant, stands_for=count, reason=reason)


def _jittered(policies: Policies, new: NewRun, now: datetime) -> NewRun:
    """The run with the time at which it is sent: its instant's, or now where that was missed, and the jitter."""
    jitter, begin = policies.jitter_of(new.id), new.scheduled_for
    if begin is None or policies.is_missed(begin, now):
        begin = now
    reason = new.reason or f"{JITTERED}sent {jitter.total_seconds():.1f} s after its instant"
    return replace(new, available_at=begin + jitter, reason=reason)


def _late(late: timedelta) -> str:
    return f"{late.total_seconds():.0f} s late"
