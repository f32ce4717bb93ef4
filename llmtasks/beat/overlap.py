"""Overlap: which of a schedule's due instants may run beside what it has not finished. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from llmtasks.policies import Misfire, Overlap, Policies, places_of
from llmtasks.states import RunState
from llmtasks.store.overlaps import Unfinished
from llmtasks.store.runs import NewRun
from llmtasks.store.schedules import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What the policy makes of the runs that are to be opened."""

    opened: list[NewRun]
    skipped: list[NewRun]
    #: Why the unfinished runs are cancelled; None leaves them alone.
    cancels: str | None = None


def asks(schedule: Schedule) -> bool:
    """Whether it matters what the schedule has not finished.

    A one-off has no other instant, and of a plain Celery task nobody knows when it ends.
    """
    return schedule.is_periodic and not schedule.handed and schedule.options.get("overlap") != Overlap.ALLOW


def decide(
    schedule: Schedule, policies: Policies, new: list[NewRun], unfinished: Unfinished | None, now: datetime
) -> Decided:
    """Apply the schedule's policy to runs of its due instants, earliest first.

    What counts was unfinished before. Several instants are due at once only for misfire "all"; those that it makes up
    for are run whatever is unfinished, because that is what was asked for.
    """
    if unfinished is None and len(new) <= 1:
        return Decided(opened=new, skipped=[])
    made_up = [item for item in new if policies.misfire is Misfire.ALL and _is_late(item, policies, now)]
    due = new[len(made_up) :]
    if not due or not asks(schedule):
        return Decided(opened=new, skipped=[])
    if policies.overlap is Overlap.CANCEL_RUNNING:
        newest = due[-1]
        why = f"overlap policy cancel_running: {_named(newest.id, newest.scheduled_for)} takes its place"
        skipped = [replace(item, reason=why) for item in due[:-1]]
        return Decided(opened=[*made_up, newest], skipped=skipped, cancels=why if unfinished else None)
    if policies.overlap is Overlap.SKIP:
        opened, left_out = ([], due) if unfinished else (due, [])
    else:
        room = (places_of(schedule.options) or 1) + 1 - (unfinished.count if unfinished else 0)
        opened, left_out = due[: max(0, room)], due[max(0, room) :]
    why = _reason(policies.overlap, unfinished or _begun(due[0]))
    return Decided(opened=[*made_up, *opened], skipped=[replace(item, reason=why) for item in left_out])


def _is_late(item: NewRun, policies: Policies, now: datetime) -> bool:
    return item.scheduled_for is not None and policies.is_missed(item.scheduled_for, now)


def _begun(new: NewRun) -> Unfinished:
    return Unfinished(count=1, run_id=new.id, state=RunState.PENDING, scheduled_for=new.scheduled_for)


def _reason(policy: Overlap, oldest: Unfinished) -> str:
    waits = ", and another waits already" if policy is Overlap.QUEUE_ONE else ""
    return f"overlap policy {policy}: {_named(oldest.run_id, oldest.scheduled_for)} is {oldest.state}{waits}"


def _named(run_id: str, scheduled_for: datetime | None) -> str:
    return f"run {run_id} ({'by hand' if scheduled_for is None else scheduled_for.isoformat()})"
