"""What a due schedule leads to: its runs, the trace of what was missed, and where it stands afterwards."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from llmtasks.beat.tick import ALL_LIMIT, Firing, fire
from llmtasks.states import ScheduleState
from llmtasks.store.runs import NewRun
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Cron, Interval, Once, Trigger

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)


def schedule(trigger: Trigger, first: datetime, *, ends_at: datetime | None = None, **options: Any) -> Schedule:
    return Schedule(
        id="5b0f",
        app="app",
        name="nightly",
        func_name="work",
        kwargs={"key": "value"},
        options=options,
        next_run_at=first,
        ends_at=ends_at,
        **trigger_columns(trigger),
    )


def instants(runs: list[NewRun]) -> list[datetime | None]:
    return [run.scheduled_for for run in runs]


def every_minute(first: datetime = NOON, **options: Any) -> Schedule:
    return schedule(Interval(MINUTE, first), first, **options)


def hours_apart(firing: Firing) -> float:
    assert firing.advance.next_at is not None
    return (firing.advance.next_at - NOON) / timedelta(hours=1)


# -- on time


def test_an_instant_on_time_is_one_run_with_the_schedules_arguments() -> None:
    """One run, no reason, and the schedule moves on to its next instant."""
    firing = fire(every_minute(), NOON + timedelta(milliseconds=20))

    assert instants(firing.new) == [NOON]
    assert (firing.new[0].kwargs, firing.new[0].reason, firing.new[0].stands_for) == ('{"key": "value"}', None, 1)
    assert firing.skipped == []
    assert (firing.advance.next_at, firing.advance.last_at) == (NOON + MINUTE, NOON)
    assert firing.advance.to is ScheduleState.ACTIVE


def test_the_same_instant_has_the_same_run_id_wherever_it_is_computed() -> None:
    """Two beats that fire one instant name one run."""
    one, other = fire(every_minute(), NOON + SECOND), fire(every_minute(), NOON + 2 * SECOND)

    assert one.new[0].id == other.new[0].id
    assert one.new[0].id != fire(every_minute(NOON + MINUTE), NOON + MINUTE).new[0].id


@pytest.mark.parametrize("late", [timedelta(), timedelta(milliseconds=900), timedelta(seconds=59)])
def test_an_interval_stays_on_its_grid_however_late_it_is_fired(late: timedelta) -> None:
    """The next instant is counted from the grid, not from when beat looked."""
    at = NOON
    for _ in range(50):
        firing = fire(every_minute(at), at + late)
        assert firing.advance.next_at == at + MINUTE
        at = firing.advance.next_at

    assert at == NOON + 50 * MINUTE


def test_an_interval_keeps_its_grid_through_a_long_absence() -> None:
    """After a day without a beat the next instant is still on the grid of the first."""
    firing = fire(every_minute(), NOON + timedelta(days=1, seconds=30))

    assert firing.advance.next_at == NOON + timedelta(days=1, minutes=1)


def test_a_cron_expression_fires_by_the_clock_of_its_zone() -> None:
    """9:00 in Berlin is 8:00 UTC in winter and 7:00 UTC in summer."""
    before_change = datetime(2026, 3, 28, 8, 0, tzinfo=UTC)
    daily = schedule(Cron("0 9 * * *", "Europe/Berlin"), before_change)

    firing = fire(daily, before_change + SECOND)

    assert instants(firing.new) == [before_change]
    assert firing.advance.next_at == datetime(2026, 3, 29, 7, 0, tzinfo=UTC)


def test_a_cron_expression_in_kathmandu_fires_at_the_quarter() -> None:
    """Zones whose offset is no whole hour."""
    first = datetime(2026, 3, 2, 3, 15, tzinfo=UTC)  # 9:00 at +05:45

    firing = fire(schedule(Cron("0 9 * * *", "Asia/Kathmandu"), first), first)

    assert firing.advance.next_at == first + timedelta(days=1)


def test_a_one_off_fires_and_is_completed() -> None:
    """It has one run and no next one."""
    firing = fire(schedule(Once(NOON), NOON), NOON + SECOND)

    assert instants(firing.new) == [NOON]
    assert (firing.advance.next_at, firing.advance.to) == (None, ScheduleState.COMPLETED)
    assert firing.advance.why == "it fired"


# -- the end


def test_the_last_instant_before_the_end_completes_the_schedule() -> None:
    """No instant after ``ends_at`` runs; an instant at it does."""
    firing = fire(every_minute(ends_at=NOON), NOON + SECOND)

    assert instants(firing.new) == [NOON]
    assert (firing.advance.to, firing.advance.why) == (ScheduleState.COMPLETED, "it reached its end")


def test_a_schedule_whose_end_passed_before_its_next_instant_runs_no_more() -> None:
    """An end that was moved before the next run: nothing runs."""
    firing = fire(every_minute(ends_at=NOON - SECOND), NOON + SECOND)

    assert firing.new == firing.skipped == []
    assert (firing.advance.next_at, firing.advance.last_at) == (None, None)
    assert firing.advance.to is ScheduleState.COMPLETED


@pytest.mark.parametrize("misfire", ["once", "all"])
def test_a_late_beat_runs_nothing_after_the_end(misfire: str) -> None:
    """What was missed is counted up to the end only."""
    firing = fire(every_minute(ends_at=NOON + 2 * MINUTE, misfire=misfire), NOON + 10 * MINUTE)

    assert instants(firing.new)[-1] == NOON + 2 * MINUTE
    assert sum(run.stands_for for run in firing.new) == 3
    assert firing.advance.to is ScheduleState.COMPLETED


# -- misfires


def test_once_runs_the_latest_instant_and_says_how_many_it_stands_for() -> None:
    """The default: an absence of ten minutes is one run."""
    firing = fire(every_minute(), NOON + 10 * MINUTE + 30 * SECOND)

    assert instants(firing.new) == [NOON + 10 * MINUTE]
    assert firing.new[0].stands_for == 11
    assert firing.new[0].reason == "stands for 11 instants that nobody could dispatch in time"
    assert firing.skipped == []
    assert firing.advance.next_at == NOON + 11 * MINUTE


def test_once_runs_a_single_late_instant_and_says_how_late() -> None:
    """A daily schedule whose beat was down for an hour runs when it is back."""
    daily = schedule(Cron("0 12 * * *"), NOON)

    firing = fire(daily, NOON + timedelta(hours=1))

    assert instants(firing.new) == [NOON]
    assert firing.new[0].reason == "3600 s late"
    assert hours_apart(firing) == 24


def test_once_counts_more_instants_than_it_could_list() -> None:
    """A year of seconds is one run, found without walking through them."""
    seconds = schedule(Interval(SECOND, NOON), NOON)

    firing = fire(seconds, NOON + timedelta(days=365))

    assert len(firing.new) == 1
    assert firing.new[0].stands_for == 365 * 86_400 + 1


def test_skip_runs_an_instant_within_the_grace() -> None:
    """What is at most ``misfire_grace`` late is on time."""
    firing = fire(every_minute(misfire="skip"), NOON + 59 * SECOND)

    assert instants(firing.new) == [NOON]
    assert firing.skipped == []


def test_skip_runs_nothing_beyond_the_grace_and_leaves_a_trace() -> None:
    """A run that is not run, with how many instants it stands for and why."""
    hourly = schedule(Interval(timedelta(hours=1), NOON), NOON, misfire="skip")

    firing = fire(hourly, NOON + timedelta(hours=2, minutes=5))

    assert firing.new == []
    assert instants(firing.skipped) == [NOON + timedelta(hours=2)]
    assert firing.skipped[0].stands_for == 3
    assert firing.skipped[0].reason == "misfire policy skip: 3 instants missed, the latest 300 s late"
    assert hours_apart(firing) == 3


def test_skip_runs_the_latest_instant_within_the_grace_and_traces_the_earlier_ones() -> None:
    """Beat returns just after an instant: that one runs, those before it do not."""
    hourly = schedule(Interval(timedelta(hours=1), NOON), NOON, misfire="skip")

    firing = fire(hourly, NOON + timedelta(hours=2, seconds=30))

    assert instants(firing.new) == [NOON + timedelta(hours=2)]
    assert firing.new[0].reason is None
    assert instants(firing.skipped) == [NOON + timedelta(hours=1)]
    assert firing.skipped[0].stands_for == 2
    assert firing.skipped[0].reason == "misfire policy skip: 2 instants missed, the latest 3630 s late"


def test_skip_completes_a_one_off_that_was_missed() -> None:
    """It did not fire, and says so."""
    firing = fire(schedule(Once(NOON), NOON, misfire="skip"), NOON + timedelta(hours=1))

    assert firing.new == []
    assert firing.skipped[0].reason == "misfire policy skip: 1 instant missed, 3600 s late"
    assert (firing.advance.to, firing.advance.why) == (ScheduleState.COMPLETED, "its instant was missed")


def test_all_runs_each_instant() -> None:
    """Earliest first, the late ones with a reason."""
    firing = fire(every_minute(misfire="all"), NOON + 3 * MINUTE + 10 * SECOND)

    assert instants(firing.new) == [NOON + step * MINUTE for step in range(4)]
    assert [run.reason for run in firing.new] == ["190 s late", "130 s late", "70 s late", None]
    assert {run.stands_for for run in firing.new} == {1}
    assert firing.skipped == []


def test_all_runs_the_latest_thousand_and_traces_the_rest() -> None:
    """A beat that was away for very long does not flood the workers, and what is left out is recorded."""
    firing = fire(every_minute(misfire="all"), NOON + 1_500 * MINUTE)

    assert len(firing.new) == ALL_LIMIT
    assert instants(firing.new)[0] == NOON + 501 * MINUTE
    assert instants(firing.new)[-1] == NOON + 1_500 * MINUTE
    assert instants(firing.skipped) == [NOON + 500 * MINUTE]
    assert firing.skipped[0].stands_for == 501


@pytest.mark.parametrize(("misfire", "runs"), [("once", 1), ("skip", 0), ("all", 1)])
def test_the_grace_is_the_schedules_own(misfire: str, runs: int) -> None:
    """``misfire_grace`` says from when on an instant is missed."""
    firing = fire(every_minute(misfire=misfire, misfire_grace=5), NOON + 6 * SECOND)

    assert len(firing.new) == runs
    assert all(run.reason for run in [*firing.new, *firing.skipped])


def test_a_grace_of_nothing_makes_every_delay_a_misfire() -> None:
    """Zero is a number, not the default."""
    assert fire(every_minute(misfire="skip", misfire_grace=0), NOON + timedelta(milliseconds=1)).new == []


def test_a_time_that_the_trigger_does_not_name_stands_for_itself() -> None:
    """A next run that is none of the trigger's instants runs once, and the trigger goes on from there."""
    daily = schedule(Cron("0 0 * * *"), NOON)

    firing = fire(daily, NOON + SECOND)

    assert instants(firing.new) == [NOON]
    assert hours_apart(firing) == 12
