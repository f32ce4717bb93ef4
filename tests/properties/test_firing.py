"""Firing: whatever the policies and however late the ticks, each instant is accounted for exactly once."""

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtasks.beat.tick import fire
from llmtasks.policies import Misfire, Overlap
from llmtasks.states import RunState, ScheduleState
from llmtasks.store.overlaps import Unfinished
from llmtasks.store.runs import NewRun
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Cron, Interval, Once, instants

START = datetime(2026, 3, 28, 23, 30, tzinfo=UTC)
TRIGGERS = st.one_of(
    st.builds(Interval, st.timedeltas(timedelta(seconds=9), timedelta(hours=2)), st.just(START)),
    st.builds(
        Cron, st.sampled_from(["* * * * *", "*/20 * * * *", "30 2 * * *"]), st.sampled_from(["Europe/Berlin", "UTC"])
    ),
    st.just(Once(START)),
)  # fmt: skip
#: Seconds until beat looks again, mostly soon; and how many runs are unfinished then.
TICKS = st.lists(
    st.tuples(st.one_of(st.floats(0, 5), st.floats(0, 400), st.floats(0, 20_000)), st.integers(0, 3)),
    min_size=1,
    max_size=12,
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "overlap": st.sampled_from(list(Overlap)),
        "misfire": st.sampled_from(list(Misfire)),
        "misfire_grace": st.sampled_from([0, 5, 60, 3600]),
        "misfire_window": st.sampled_from([1, 90, 7200]),
        "max_runs": st.integers(1, 30),
        "max_instances": st.integers(1, 3),
        "jitter_seconds": st.sampled_from([0, 10]),
    },
)


def covered_by(schedule: Schedule, item: NewRun) -> list[datetime]:
    """The instants that a row stands for: its own and those just before it."""
    assert item.scheduled_for is not None
    return list(instants(schedule.trigger, START - timedelta(seconds=1), item.scheduled_for))[-item.stands_for :]


@settings(deadline=None, max_examples=150)
@given(
    trigger=TRIGGERS,
    ticks=TICKS,
    options=OPTIONS,
    ends_at=st.none() | st.timedeltas(timedelta(), timedelta(days=1)).map(lambda span: START + span),
)
def test_each_instant_is_run_or_coalesced_or_skipped_exactly_once(
    trigger: Any, ticks: list[tuple[float, int]], options: dict[str, Any], ends_at: datetime | None
) -> None:
    """From the first tick to the last no instant is left out and none has two rows; max_runs is never exceeded."""
    first = trigger.next_after(START - timedelta(microseconds=1))
    schedule = Schedule(
        id="s", app="app", name="s", func_name="work", options=options, next_run_at=first, ends_at=ends_at,
        **trigger_columns(trigger),
    )  # fmt: skip
    now, opened, covered, last = first, [], [], None
    for wait, count in ticks:
        assert schedule.next_run_at is not None
        # The counts of cron expressions stop at a thousand.
        now = max(now, schedule.next_run_at) + timedelta(seconds=wait)
        oldest = Unfinished(count=count, run_id="r", state=RunState.RUNNING, scheduled_for=None) if count else None
        firing = fire(schedule, now, oldest)
        opened += firing.new
        rows = sorted([*firing.new, *firing.skipped], key=lambda item: item.scheduled_for or now)
        covered += [instant for item in rows for instant in covered_by(schedule, item)]
        move = firing.advance
        last = move.last_at or last
        assert move.fired_now == len(firing.new)
        assert all(item.available_at is None or item.available_at >= (item.scheduled_for or now) for item in firing.new)
        schedule = Schedule(
            **{name: getattr(schedule, name) for name in Schedule.__dataclass_fields__}
            | {"next_run_at": move.next_at, "state": move.to, "fired": schedule.fired + move.fired_now}
        )
        if move.next_at is None:
            break

    until = now if ends_at is None else min(now, ends_at)
    most = options.get("max_runs")
    if schedule.state is ScheduleState.COMPLETED and len(opened) == most and last is not None:
        until = min(until, last)
    assert covered == list(instants(trigger, START - timedelta(microseconds=1), until))
    assert most is None or len(opened) <= most
    assert len({item.id for item in opened}) == len(opened)
    if schedule.state is ScheduleState.ACTIVE:
        assert schedule.next_run_at == trigger.next_after(until)
