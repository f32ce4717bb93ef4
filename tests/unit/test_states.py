"""The tables of states are complete and fit each other."""

import pytest
from celery import states

from llmtasks.states import CELERY_STATE, CLAIMABLE, ENDED, FOLLOWS, LIVE, UNSTARTED, RunState, ScheduleState


def test_every_state_has_a_row_in_every_table() -> None:
    """No state is forgotten where states are looked up."""
    assert set(FOLLOWS) == set(CELERY_STATE) == set(RunState)


def test_what_a_state_follows_is_a_state() -> None:
    """The table of transitions names run states only."""
    assert all(isinstance(state, RunState) for before in FOLLOWS.values() for state in before)


def test_live_and_ended_divide_the_states() -> None:
    """Each state is one or the other, and says which."""
    assert set(RunState) == LIVE | ENDED
    assert not LIVE & ENDED
    assert {state for state in RunState if state.is_final} == ENDED


def test_a_run_starts_only_once_claimed() -> None:
    """Running follows the claimable states and no other, which have not started yet."""
    assert FOLLOWS[RunState.RUNNING] == CLAIMABLE
    assert CLAIMABLE < UNSTARTED == LIVE - {RunState.RUNNING}


def test_a_retry_passes_through_pending() -> None:
    """A retrying run cannot be claimed: it becomes pending first."""
    assert [state for state, before in FOLLOWS.items() if RunState.RETRYING in before and state not in ENDED] == [
        RunState.PENDING
    ]


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.CANCELLED])
def test_every_live_run_can_be_failed_or_cancelled(state: RunState) -> None:
    """Cancel and rescue reach a run wherever it is."""
    assert FOLLOWS[state] == LIVE


def test_only_a_run_that_ran_succeeds() -> None:
    """Success follows running alone."""
    assert FOLLOWS[RunState.SUCCEEDED] == {RunState.RUNNING}


def test_celerys_names_agree_on_what_is_final() -> None:
    """A state is final here exactly where what Celery calls it is ready there."""
    ready = states.READY_STATES | {states.IGNORED}

    assert {state for state, name in CELERY_STATE.items() if name in ready} == ENDED
    assert set(CELERY_STATE.values()) <= states.ALL_STATES | {states.IGNORED}


def test_states_are_stored_as_plain_words() -> None:
    """What the database holds is the state's own lower-case name."""
    assert all(state.value == state.name.lower() == f"{state}" for kind in (RunState, ScheduleState) for state in kind)
