"""Whatever way a run takes through its states, it ends once and stays there."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtasks.states import ENDED, FOLLOWS, LIVE, RunState

#: The same examples each time, however slow the machine is at the moment.
repeatable = settings(deadline=None, derandomize=True)

AFTER = {state: sorted(next_ for next_, before in FOLLOWS.items() if state in before) for state in RunState}


def reachable(start: RunState) -> set[RunState]:
    seen, todo = {start}, [start]
    while todo:
        new = set(AFTER[todo.pop()]) - seen
        seen |= new
        todo.extend(new)
    return seen


@repeatable
@given(wishes=st.lists(st.sampled_from(RunState), max_size=60))
def test_no_path_leaves_a_final_state(wishes: list[RunState]) -> None:
    """Of any list of wished moves, those that the table allows never lead out of an end."""
    state, ends = RunState.PENDING, 0

    for wish in wishes:
        if state in FOLLOWS[wish]:
            assert not state.is_final
            state, ends = wish, ends + wish.is_final

    assert ends == int(state.is_final)


@repeatable
@given(wishes=st.lists(st.sampled_from(RunState), max_size=60))
def test_from_wherever_a_path_stands_every_kind_of_end_but_skipping_is_reachable(wishes: list[RunState]) -> None:
    """A run that has not ended can still succeed, fail and be cancelled."""
    state = RunState.PENDING

    for wish in wishes:
        state = wish if state in FOLLOWS[wish] else state

    assert state.is_final or reachable(state) >= ENDED - {RunState.SKIPPED}


@repeatable
@given(state=st.sampled_from(RunState))
def test_the_table_is_closed(state: RunState) -> None:
    """Every state is reachable from the first one, follows live states only, and none follows itself."""
    assert state in reachable(RunState.PENDING)
    assert FOLLOWS[state] <= LIVE
    assert state not in FOLLOWS[state]
    assert bool(AFTER[state]) is (state in LIVE)
