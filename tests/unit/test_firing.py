"""What a due schedule leads to: its runs, the trace of what was missed, and where it stands afterwards."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from llmtasks.beat.tick import ALL_LIMIT, Firing, fire
from llmtasks.states import RunState, ScheduleState
from llmtasks.store.overlaps import Unfinished
from llmtasks.store.runs import NewRun
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Cron, Interval, Once, Trigger

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)


def schedule(
    trigger: Trigger, first: datetime, *, ends_at: datetime | None = None, fired: int = 0, **options: Any
) -> Schedule:
    return Schedule(
        id="5b0f",
        app="app",
        name="nightly",
        func_name="work",
        kwargs={"key": "value"},
        options=options,
        next_run_at=first,
        ends_at=ends_at,
        fired=fired,
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


# -- the window


def test_all_runs_only_instants_within_the_window_and_traces_the_older_ones() -> None:
    """What is later than ``misfire_window`` is one skipped row that says how many it stands for."""
    firing = fire(every_minute(misfire="all", misfire_window=300), NOON + 10 * MINUTE + 30 * SECOND)

    assert instants(firing.new) == [NOON + step * MINUTE for step in range(6, 11)]
    assert instants(firing.skipped) == [NOON + 5 * MINUTE]
    assert firing.skipped[0].stands_for == 6
    assert firing.skipped[0].reason == "misfire policy all within 300 s: 6 instants missed, the latest 330 s late"


def test_nothing_within_the_window_runs_nothing() -> None:
    """A nightly schedule whose beat returns in the morning, with a window of an hour."""
    nightly = schedule(Cron("0 12 * * *"), NOON, misfire="all", misfire_window=3600)

    firing = fire(nightly, NOON + timedelta(hours=5))

    assert firing.new == []
    assert firing.skipped[0].reason == "misfire policy all within 3600 s: 1 instant missed, 18000 s late"
    assert hours_apart(firing) == 24


def test_an_instant_on_time_runs_however_short_the_window() -> None:
    """The window is about missed instants; within the grace none is."""
    firing = fire(every_minute(misfire="all", misfire_window=1), NOON + 30 * SECOND)

    assert instants(firing.new) == [NOON]
    assert firing.skipped == []


def test_window_does_not_lift_the_limit() -> None:
    """No more than the latest thousand, however long the window."""
    firing = fire(every_minute(misfire="all", misfire_window=10**6), NOON + 1_500 * MINUTE)

    assert len(firing.new) == ALL_LIMIT
    assert sum(run.stands_for for run in firing.skipped) == 501


# -- max_runs


def test_the_last_of_max_runs_completes_the_schedule() -> None:
    """It says why, and has no next run."""
    firing = fire(every_minute(max_runs=3, fired=2), NOON + SECOND)

    assert instants(firing.new) == [NOON]
    assert (firing.advance.to, firing.advance.next_at) == (ScheduleState.COMPLETED, None)
    assert firing.advance.why == "max_runs: it had all of its 3"
    assert firing.advance.fired_now == 1


def test_of_several_missed_instants_only_the_earliest_that_max_runs_leaves_run() -> None:
    """What comes after the last run is no instant of the schedule any more."""
    firing = fire(every_minute(max_runs=5, fired=3, misfire="all"), NOON + 10 * MINUTE)

    assert instants(firing.new) == [NOON, NOON + MINUTE]
    assert firing.skipped == []
    assert (firing.advance.last_at, firing.advance.to) == (NOON + MINUTE, ScheduleState.COMPLETED)


def test_a_run_that_stands_for_several_instants_is_one_of_max_runs() -> None:
    """What is counted are runs."""
    firing = fire(every_minute(max_runs=2), NOON + 10 * MINUTE)

    assert (firing.advance.fired_now, firing.advance.to) == (1, ScheduleState.ACTIVE)


def test_a_skipped_instant_is_none_of_max_runs() -> None:
    """Neither one that was missed nor one that overlaps."""
    missed = fire(every_minute(max_runs=1, misfire="skip"), NOON + 90 * SECOND)
    overlapping = fire(every_minute(max_runs=1), NOON, UNFINISHED)

    assert (overlapping.advance.fired_now, overlapping.advance.to) == (0, ScheduleState.ACTIVE)
    assert [run.stands_for for run in missed.skipped] == [1]
    assert (missed.advance.fired_now, missed.advance.to) == (1, ScheduleState.COMPLETED)


def test_a_lowered_max_runs_completes_the_schedule_without_a_run() -> None:
    """Code that declares fewer than there were already."""
    firing = fire(every_minute(max_runs=2, fired=5), NOON)

    assert firing.new == firing.skipped == []
    assert (firing.advance.to, firing.advance.why) == (ScheduleState.COMPLETED, "max_runs: it had all of its 2")


# -- overlap

UNFINISHED = Unfinished(count=1, run_id="r1", state=RunState.RUNNING, scheduled_for=NOON - MINUTE)
NAMED = "run r1 (2026-03-02T11:59:00+00:00) is running"


def test_skip_leaves_out_an_instant_that_comes_while_another_run_is_unfinished() -> None:
    """The default: the trace names the run that was in the way, and the schedule goes on."""
    firing = fire(every_minute(), NOON + SECOND, UNFINISHED)

    assert firing.new == []
    assert instants(firing.skipped) == [NOON]
    assert firing.skipped[0].reason == f"overlap policy skip: {NAMED}"
    assert firing.skipped[0].id == fire(every_minute(), NOON).new[0].id
    assert (firing.advance.next_at, firing.advance.last_at) == (NOON + MINUTE, NOON)


def test_skip_leaves_out_a_run_that_would_stand_for_missed_instants() -> None:
    """Each of them would have been skipped in its time; the trace counts them."""
    firing = fire(every_minute(), NOON + 10 * MINUTE, UNFINISHED)

    assert firing.new == []
    assert [run.stands_for for run in firing.skipped] == [11]


def test_skip_names_a_run_by_hand_as_one() -> None:
    """It belongs to no instant."""
    by_hand = Unfinished(count=1, run_id="r2", state=RunState.QUEUED, scheduled_for=None)

    firing = fire(every_minute(), NOON, by_hand)

    assert firing.skipped[0].reason == "overlap policy skip: run r2 (by hand) is queued"


@pytest.mark.parametrize(
    ("max_instances", "unfinished", "runs"), [(None, 0, 1), (None, 1, 1), (None, 2, 0), (3, 3, 1), (3, 4, 0)]
)
def test_queue_one_lets_one_run_wait(max_instances: int | None, unfinished: int, runs: int) -> None:
    """Behind as many as may run at once, which is one where nobody says otherwise."""
    found = Unfinished(count=unfinished, run_id="r1", state=RunState.RUNNING, scheduled_for=NOON - MINUTE)

    firing = fire(every_minute(overlap="queue_one", max_instances=max_instances), NOON, found if unfinished else None)

    assert len(firing.new) == runs
    assert [run.schedule_slots for run in firing.new] == [max_instances or 1] * runs
    assert [run.reason for run in firing.skipped] == [f"overlap policy queue_one: {NAMED}, and another waits already"][
        runs:
    ]


def test_allow_asks_for_nothing() -> None:
    """Whatever is unfinished, the instant runs, and nothing but ``max_instances`` limits it."""
    firing = fire(every_minute(overlap="allow"), NOON, UNFINISHED)

    assert instants(firing.new) == [NOON]
    assert (firing.new[0].schedule_slots, firing.skipped, firing.cancels) == (None, [], None)


def test_cancel_running_cancels_for_the_new_run_which_waits_for_their_place() -> None:
    """The reason of the cancelled ones names the run that takes their place."""
    firing = fire(every_minute(overlap="cancel_running"), NOON, UNFINISHED)

    assert instants(firing.new) == [NOON]
    assert firing.new[0].schedule_slots == 1
    assert firing.cancels == (
        f"overlap policy cancel_running: run {firing.new[0].id} (2026-03-02T12:00:00+00:00) takes its place"
    )
    assert fire(every_minute(overlap="cancel_running"), NOON).cancels is None


def test_nothing_is_cancelled_for_a_run_that_max_runs_does_not_leave() -> None:
    """The last run is an earlier one, which was made up for."""
    options = {"overlap": "cancel_running", "misfire": "all", "max_runs": 1}

    firing = fire(every_minute(**options), NOON + 3 * MINUTE, UNFINISHED)

    assert (instants(firing.new), firing.cancels) == ([NOON], None)


@pytest.mark.parametrize("overlap", ["skip", "queue_one", "cancel_running"])
def test_instants_that_all_makes_up_for_run_whatever_is_unfinished(overlap: str) -> None:
    """Those later than the grace; the one that is on time is judged as always."""
    firing = fire(every_minute(misfire="all", overlap=overlap), NOON + 3 * MINUTE + 10 * SECOND, UNFINISHED)

    made_up = [NOON, NOON + MINUTE, NOON + 2 * MINUTE]
    assert instants(firing.new) == (made_up if overlap == "skip" else [*made_up, NOON + 3 * MINUTE])
    assert len(firing.skipped) == (overlap == "skip")


def test_a_one_off_does_not_overlap() -> None:
    """A run by hand does not keep it from its only instant."""
    assert len(fire(schedule(Once(NOON), NOON), NOON, UNFINISHED).new) == 1


# -- jitter


def test_jitter_moves_the_message_and_not_the_instant() -> None:
    """The delay is a part of ``jitter_seconds``, the same whoever computes it, and another for the next instant."""
    one, again = fire(every_minute(jitter_seconds=30), NOON), fire(every_minute(jitter_seconds=30), NOON + 5 * SECOND)
    delays = []
    for step in range(100):
        at = NOON + step * MINUTE
        run = fire(every_minute(at, jitter_seconds=30), at).new[0]
        assert run.available_at is not None
        delays.append((run.available_at - at).total_seconds())

    assert instants(one.new) == [NOON]
    assert one.new[0].available_at == again.new[0].available_at
    assert all(0 <= delay < 30 for delay in delays)
    assert len(set(delays)) == 100
    assert 10 < sum(delays) / 100 < 20
    assert one.new[0].reason == f"jitter: sent {delays[0]:.1f} s after its instant"
    assert one.advance.next_at == NOON + MINUTE


def test_jitter_spreads_missed_instants_from_now_on() -> None:
    """After an outage not all schedules run in the same second."""
    late = NOON + timedelta(hours=1)

    run = fire(schedule(Cron("0 12 * * *"), NOON, jitter_seconds=30), late).new[0]

    assert run.available_at is not None
    assert late <= run.available_at < late + 30 * SECOND
    assert run.reason == "3600 s late"
