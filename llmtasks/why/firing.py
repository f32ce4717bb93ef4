"""Why a schedule does not fire, or when it will."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from llmtasks.states import LIVE, PauseKind, RunState, ScheduleState
from llmtasks.store import runs, standing
from llmtasks.store.runs import Run
from llmtasks.store.schedules import Schedule
from llmtasks.why.explanation import Explanation, Fact
from llmtasks.why.scene import Scene
from llmtasks.wording import counted, listed, utc

#: Live runs of a schedule that are listed.
SHOWN: Final = 5
#: A beat that lives fires what is due sooner than this.
SOON: Final = timedelta(seconds=5)


def explain_schedule(scene: Scene, schedule: Schedule) -> Explanation:
    """Why a stored schedule does not run, or when it will."""
    with scene.at.database.reading() as connection:
        last = standing.last_instant(connection, schedule.id)
        live = runs.find(connection, schedule.app, states=LIVE, schedule_id=schedule.id, limit=SHOWN)
    answer = f"schedule {schedule.name!r} {_state(scene, schedule)}"
    if last is not None and last.state is RunState.SKIPPED and last.reason:
        answer += f"; its last instant was skipped: {last.reason}"
    facts = [
        *_when(schedule),
        *_last(last),
        *(_run(run) for run in live),
        Fact(name="function", value=schedule.func_name),
    ]
    if schedule.state is ScheduleState.ACTIVE:
        knows = listed(worker.name for worker in scene.workers if schedule.func_name in worker.functions)
        facts += [Fact(name="workers that know it", value=knows or "none"), *scene.process_facts()]
        facts += scene.broker_facts()
    return Explanation(
        kind="task",
        id=schedule.id,
        name=schedule.name,
        state=str(schedule.state),
        answer=answer,
        facts=tuple(facts),
    )


def _state(scene: Scene, schedule: Schedule) -> str:
    reason = schedule.reason or "nobody said why"
    match schedule.state:
        case ScheduleState.PAUSED:
            since = schedule.paused_at
            when = "" if since is None else f" since {utc(since)} ({scene.ago(since)})"
            return f"is {schedule.reason or 'paused'}{when}"
        case ScheduleState.COMPLETED:
            return f"is completed: {reason}"
        case ScheduleState.CANCELLED:
            return f"is cancelled: {reason}"
        case _:
            pass
    if schedule.next_run_at is None:
        return (
            f"was {schedule.reason}"
            if (schedule.reason or "").startswith("set aside")
            else f"has no next run: {reason}"
        )
    return f"{_due(scene, schedule, schedule.next_run_at)}{_but(scene, schedule)}"


def _due(scene: Scene, schedule: Schedule, at: datetime) -> str:
    zone = f" ({_in_zone(at, schedule.timezone)})" if schedule.timezone not in {None, "UTC"} else ""
    if at > scene.now:
        return f"is next due at {utc(at)}{zone}, {scene.until(at)}"
    if scene.now - at <= SOON and scene.beats:
        return f"is due now, since {utc(at)}{zone}"
    late = f"was due at {utc(at)}{zone}, {scene.ago(at)}"
    alive = counted(len(scene.beats), "beat")
    return f"{late}, although {alive} {'is' if len(scene.beats) == 1 else 'are'} alive" if scene.beats else late


def _but(scene: Scene, schedule: Schedule) -> str:
    """What keeps an active schedule from running when it is due."""
    if not scene.beats:
        return ", but no beat is alive to fire it"
    if not scene.workers:
        return ", but no worker is alive to run it"
    if not any(schedule.func_name in worker.functions for worker in scene.workers):
        return f", but no live worker knows {schedule.func_name!r}"
    if not schedule.handed and not any(schedule.func_name in beat.functions for beat in scene.beats):
        return f", but no live beat knows {schedule.func_name!r}"
    paused = scene.pause_of(PauseKind.FUNCTION, schedule.func_name)
    if paused is not None:
        return f", but {paused}: its runs wait"
    return "" if scene.broker_fault is None else ", but the broker does not answer: its runs wait in the outbox"


def _when(schedule: Schedule) -> list[Fact]:
    facts: list[Fact] = []
    if schedule.next_run_at is not None:
        facts.append(Fact(name="next due", value=schedule.next_run_at))
        if schedule.timezone is not None:
            facts.append(Fact(name="in its zone", value=_in_zone(schedule.next_run_at, schedule.timezone)))
    if schedule.paused_at is not None:
        facts.append(Fact(name="paused", value=schedule.paused_at))
    if schedule.ends_at is not None:
        facts.append(Fact(name="ends", value=schedule.ends_at))
    if schedule.reason:
        facts.append(Fact(name="reason", value=schedule.reason))
    return facts


def _last(last: Run | None) -> list[Fact]:
    if last is None or last.scheduled_for is None:
        return []
    said = f": {last.reason}" if last.reason else ""
    stands_for = f", stands for {last.stands_for} instants" if last.stands_for > 1 else ""
    return [
        Fact(name="last instant", value=last.scheduled_for),
        Fact(name="its run", value=f"{last.id} is {last.state}{stands_for}{said}"),
    ]


def _run(run: Run) -> Fact:
    where = f" on {run.worker}" if run.state is RunState.RUNNING and run.worker else ""
    return Fact(name="live run", value=f"{run.id} is {run.state}{where}" + (f": {run.reason}" if run.reason else ""))


def _in_zone(instant: datetime, zone: str | None) -> str:
    try:
        return f"{instant.astimezone(ZoneInfo(zone or 'UTC')):%Y-%m-%d %H:%M:%S} {zone}"
    except (KeyError, ValueError, OSError):  # a row that says so was set aside
        return f"{zone!r} is no zone"
