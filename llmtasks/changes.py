"""Changes: what becomes of a stored schedule that is saved again, paused or resumed.

Nothing here reads or writes: rows and instants go in, rows come out.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from llmtasks.errors import ForbiddenTransitionError, InvalidOptionError, InvalidTriggerError
from llmtasks.policies import POLICY_NAMES, REACHED_END, had_its_runs
from llmtasks.states import ScheduleState
from llmtasks.store.schedules import Schedule

#: What a Task may say in place of its function's registration; kept in the row as given.
OPTION_NAMES: Final = ("priority", "timeout", "max_retries", "max_instances", "queue", *POLICY_NAMES)
#: What a row keeps when its Task is saved again.
_KEPT: Final = ("app", "state", "reason", "paused_at", "last_run_at", "fired", "created_at")
_TICK: Final = timedelta(microseconds=1)


def first_run(row: Schedule, now: datetime) -> datetime | None:
    """The first instant of a row that begins now, its end aside; an interval begins with its anchor."""
    after = row.anchor - _TICK if row.kind == "interval" and row.anchor is not None else now
    return replace(row, ends_at=None).next_after(after)


def begun(row: Schedule, now: datetime) -> Schedule:
    """A checked row as it is first stored.

    Raises:
        InvalidTriggerError: It would never run.
    """
    if row.kind == "once" and row.anchor is not None and row.anchor <= now:
        raise past(row.anchor, now)
    return _within_limits(row)


def saved_over(before: Schedule, checked: Schedule, *, moved: bool, now: datetime) -> Schedule:
    """A checked row as it replaces the one that is there: the next run moves only with the trigger or its start.

    Args:
        before: What is stored.
        checked: What is wanted.
        moved: Whether the next run moves although the trigger is the same.
        now: An interval that was set aside goes on at its first instant after this.

    Raises:
        ForbiddenTransitionError: What is stored is cancelled, or code declares it otherwise.
        InvalidTriggerError: It would never run again.
        InvalidOptionError: It had more runs already than it may have.
    """
    if before.state is ScheduleState.CANCELLED:
        raise ForbiddenTransitionError(
            f"Task {before.name!r} ({before.id}) is cancelled for good: save a new Task instead"
        )
    if before.declared_key is not None:
        return _as_declared(before, checked)
    row = replace(checked, **{name: getattr(before, name) for name in _KEPT})
    moved = moved or not same_instants(before, checked, now)
    if moved and before.state is ScheduleState.COMPLETED:
        return _within_limits(replace(row, state=ScheduleState.ACTIVE, reason=None, fired=0))
    if (again := revived(before, row, now)) is not None:
        return again
    if not moved:
        # A row that was set aside begins again at its next instant.
        row = replace(row, anchor=before.anchor or row.anchor)
        row = replace(row, next_run_at=before.next_run_at or replace(row, ends_at=None).next_after(now))
    active = before.state is ScheduleState.ACTIVE
    return _within_limits(replace(row, reason=None) if active else replace(row, next_run_at=None))


def same_instants(before: Schedule, wanted: Schedule, now: datetime) -> bool:
    """Whether the next run stays where it is: the same trigger, and a start that passed or is the same."""
    starts = [row.starts_at if row.starts_at and row.starts_at > now else None for row in (before, wanted)]
    return before.same_trigger(wanted) and starts[0] == starts[1]


def revived(before: Schedule, row: Schedule, now: datetime) -> Schedule | None:
    """A completed row that goes on, because its end or ``max_runs`` changed and leaves it a run; None where not."""
    limits = [(item.ends_at, item.options.get("max_runs")) for item in (before, row)]
    if before.state is not ScheduleState.COMPLETED or not row.is_periodic or limits[0] == limits[1]:
        return None
    row = replace(row, anchor=before.anchor or row.anchor)
    following = row.next_after(now)
    if following is None or row.runs_left == 0:
        return None
    return replace(row, state=ScheduleState.ACTIVE, reason=None, next_run_at=following)


def within_limits(row: Schedule) -> Schedule:
    """The row; completed where its end or ``max_runs`` leaves it no run."""
    if row.state is not ScheduleState.ACTIVE:
        return row
    if row.runs_left == 0:
        return replace(row, state=ScheduleState.COMPLETED, next_run_at=None, reason=had_its_runs(row.options))
    if row.next_run_at is not None and row.ends_at is not None and row.next_run_at > row.ends_at:
        return replace(row, state=ScheduleState.COMPLETED, next_run_at=None, reason=REACHED_END)
    return row


def upcoming(row: Schedule, now: datetime, count: int) -> list[datetime]:
    """The next instants of a row; of one that is not active those that it would have if it were resumed now."""
    found: list[datetime] = []
    most = count if row.runs_left is None else min(count, row.runs_left)
    instant = row.next_run_at if row.state is ScheduleState.ACTIVE else row.next_after(now)
    while instant is not None and len(found) < most and (row.ends_at is None or instant <= row.ends_at):
        found.append(instant)
        instant = row.next_after(instant)
    return found


def check_movable(row: Schedule, verb: str) -> None:
    """Check that a row may be paused and resumed.

    Raises:
        ForbiddenTransitionError: It is cancelled or completed.
    """
    if row.state not in {ScheduleState.ACTIVE, ScheduleState.PAUSED}:
        raise ForbiddenTransitionError(
            f"Task {row.name!r} ({row.id}) is {row.state}: {verb} works on an active or a paused one; "
            "save a new Task instead"
        )


def paused(row: Schedule, now: datetime, by: str | None = None) -> Schedule:
    """A row that fires no more until it is resumed; it says since when and who wanted that."""
    reason = None if by is None else f"paused by {by}"
    return replace(row, state=ScheduleState.PAUSED, next_run_at=None, reason=reason, paused_at=now)


def resumed(row: Schedule, now: datetime) -> Schedule:
    """A row that fires at its next instant after ``now``; without one it is completed."""
    following, row = row.next_after(now), replace(row, paused_at=None)
    if following is None:
        over = "its last instant passed while it was paused"
        return replace(row, state=ScheduleState.COMPLETED, next_run_at=None, reason=over)
    return within_limits(replace(row, state=ScheduleState.ACTIVE, next_run_at=following, reason=None))


def past(at: datetime, now: datetime) -> InvalidTriggerError:
    """The error of a one-off whose instant is over."""
    return InvalidTriggerError(
        f"scheduled_at={at.isoformat()}: expected an instant after now ({now.isoformat()}); "
        "execute_now() runs it at once"
    )


def _within_limits(row: Schedule) -> Schedule:
    """The row; raises where its start, its end or ``max_runs`` leaves it no run."""
    if row.state is ScheduleState.ACTIVE and row.next_run_at is None and row.starts_at is not None:
        raise InvalidTriggerError(
            f"starts_at={row.starts_at.isoformat()}: expected not after the last instant of its trigger"
        )
    if row.ends_at is not None and row.next_run_at is not None and row.next_run_at > row.ends_at:
        raise InvalidTriggerError(
            f"ends_at={row.ends_at.isoformat()}: expected not before the next run, {row.next_run_at.isoformat()}"
        )
    if row.state in {ScheduleState.ACTIVE, ScheduleState.PAUSED} and row.runs_left == 0:
        expected = f"more than the {row.fired} runs that it had already"
        raise InvalidOptionError("max_runs", row.options["max_runs"], expected, "cancel() ends it.")
    return row


def _as_declared(before: Schedule, checked: Schedule) -> Schedule:
    """The row as it is; raises where what code declares would change."""
    shown = {name: before.options[name] for name in OPTION_NAMES if name in before.options}
    mine = (before.name, before.func_name, before.kwargs, shown, before.starts_at, before.ends_at)
    theirs = (checked.name, checked.func_name, checked.kwargs, checked.options, checked.starts_at, checked.ends_at)
    if mine != theirs or not before.same_trigger(checked):
        raise ForbiddenTransitionError(
            f"schedule {before.name!r} is declared in code, which owns its trigger, params and options: "
            "change them there; pause, resume, cancel and execute_now work here"
        )
    return before
