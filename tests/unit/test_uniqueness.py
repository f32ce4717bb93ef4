"""Options of unique functions, which calls are the same, and what a schedule's instants come to. No database."""

import functools
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from llmtasks.beat.duplicates import Claimant
from llmtasks.beat.tick import Firing, fire
from llmtasks.errors import InvalidOptionError, InvalidParamsError
from llmtasks.identity import check_identity, unique_of
from llmtasks.options import TaskOptions
from llmtasks.states import ENDED, LIVE, RunState, ScheduleState
from llmtasks.store.keys import Holder
from llmtasks.store.overlaps import Unfinished
from llmtasks.store.schedules import Schedule, trigger_columns
from llmtasks.triggers import Interval
from llmtasks.uniqueness import Duplicate, Unique, UniqueRule, rule_of

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def rule(**options: Any) -> UniqueRule:
    found = rule_of({"unique": True, **options})
    assert found is not None
    return found


def key(function: Callable[..., Any], *args: Any, app: str = "app", options: Any = True, **kwargs: Any) -> str:
    built = TaskOptions.build("f", {"unique": options}, None)
    found = unique_of(app, built, function, args, kwargs)
    assert found is not None
    return found.key


def takes(a: Any, b: Any = 2, *rest: Any, c: Any = None, **more: Any) -> None:
    """A signature with everything in it."""


# -- options


def test_defaults_are_all_arguments_all_unfinished_states_and_return() -> None:
    """What nobody says more about is the simplest that is safe."""
    assert rule() == UniqueRule(parameters=None, states=LIVE, period=None, on_duplicate=Duplicate.RETURN)
    assert rule_of({}) is rule_of({"unique": False}) is None
    assert rule(unique="b").parameters == ("b",)
    assert rule(unique=["b", "a"]).parameters == ("a", "b")
    assert rule(unique_for=90).period == rule(unique_for=timedelta(seconds=90)).period == timedelta(seconds=90)
    assert rule(unique_states=["queued"]).states == {RunState.QUEUED}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"unique": 1}, "unique=1: expected True, the name of a parameter, or a tuple of such names"),
        ({"unique": ()}, r"unique=\(\): expected True"),
        ({"unique": ("a", 2)}, "expected True, the name of a parameter"),
        ({"unique": True, "unique_for": 0}, "unique_for=0: expected a number above 0"),
        ({"unique": True, "unique_for": "1h"}, "unique_for='1h': expected a number"),
        ({"unique": True, "unique_for": 1e300}, "unique_for=.*well below a million years"),
        (
            {"unique": True, "unique_states": "queued"},
            "unique_states='queued': expected a tuple of 'pending', 'queued'",
        ),
        ({"unique": True, "unique_states": ()}, "expected a tuple of"),
        ({"unique": True, "unique_states": ("failed",)}, "unique_for is for runs that have ended"),
        ({"unique": True, "on_duplicate": "ignore"}, "on_duplicate='ignore': expected one of 'return', 'replace'"),
        ({"unique_for": 60}, "unique_for=60: expected a value only together with unique"),
        ({"unique_states": ("queued",)}, "only together with unique"),
        ({"on_duplicate": "return"}, "only together with unique"),
        ({"unique": True, "unique_for": 60, "on_duplicate": "replace"}, "What has ended cannot be replaced"),
    ],
)
def test_wrong_option_is_refused_at_import(options: dict[str, Any], said: str) -> None:
    """The error names the option, the value and what was expected."""
    with pytest.raises(InvalidOptionError, match=said):
        TaskOptions.build("f", options, None)


def test_parameters_must_exist_and_have_comparable_defaults() -> None:
    """A misspelt parameter would make all runs the same; an object as default none."""

    def odd(a: int, client: object = print) -> None: ...

    with pytest.raises(InvalidOptionError, match="unique='documnet': expected a parameter of f: a, client"):
        check_identity(TaskOptions.build("f", {"unique": "documnet"}, None), odd)
    with pytest.raises(InvalidOptionError, match=r"defaults JSON can carry\. the default of client is"):
        check_identity(TaskOptions.build("f", {"unique": True}, None), odd)
    check_identity(TaskOptions.build("f", {"unique": "a"}, None), odd)
    check_identity(TaskOptions.build("f", {"unique": ("a", "anything")}, None), takes)
    with pytest.raises(InvalidOptionError, match="unique='self'"):
        check_identity(TaskOptions.build("f", {"unique": "self", "bind": True}, None), lambda self, a: None)


# -- identity


def test_calls_are_compared_after_binding() -> None:
    """Positional, by keyword, with defaults spelled out: what the function gets is what counts."""
    same = key(takes, 1)

    assert key(takes, a=1) == key(takes, 1, 2) == key(takes, b=2, a=1) == key(takes, 1, c=None) == same
    other = [
        key(takes, 2),
        key(takes, 1, 3),
        key(takes, 1, 2, 3),
        key(takes, 1, d=4),
        key(takes, True),
        key(takes, "1"),
    ]
    assert len({same, *other, key(takes, 1, app="other")}) == len(other) + 2


def test_values_are_compared_as_json() -> None:
    """The order of a dict's keys, a tuple for a list and the richer types make no difference between the two ends."""
    rich = {"day": date(2026, 3, 1), "id": UUID(int=7), "pair": (1, 2)}

    assert key(takes, rich) == key(takes, {"pair": [1, 2], "id": UUID(int=7), "day": date(2026, 3, 1)})
    assert key(takes, rich) != key(takes, {**rich, "day": "2026-03-01"})
    with pytest.raises(InvalidParamsError, match=r"a is <object"):
        key(takes, object())
    with pytest.raises(InvalidParamsError, match="do not fit its signature"):
        key(takes)


def test_only_named_parameters_are_compared() -> None:
    """Those of **kwargs too; one that is not given is None."""
    assert key(takes, 1, 5, options="a") == key(takes, 1, 6, d=7, options="a")
    assert key(takes, 1, d=7, options="d") == key(takes, 2, d=7, options="d") != key(takes, 1, options="d")
    assert key(takes, 1, 5, options=("a", "b")) != key(takes, 1, 6, options=("b", "a"))


def test_self_and_wrappers_are_not_compared() -> None:
    """The function's own signature is what its callers see."""

    @functools.wraps(takes)
    def wrapper(*args: Any, **kwargs: Any) -> None: ...

    assert key(wrapper, a=1) == key(takes, 1)
    bound = TaskOptions.build("f", {"unique": True, "bind": True}, None)
    found = unique_of("app", bound, lambda self, a: None, (1,), {})
    assert found is not None
    assert found.key == key(lambda a: None, 1)


# -- what counts


@pytest.mark.parametrize("state", sorted(RunState))
def test_what_counts(state: RunState) -> None:
    """The chosen states always; within the period whatever has not come to nothing."""
    plain = Unique(key="k", rule=rule())
    period = Unique(key="k", rule=rule(unique_for=60, unique_states=["queued"]))

    assert plain.counts(state, NOON, NOON + 100 * MINUTE) == (state in LIVE)
    nothing = state in {RunState.CANCELLED, RunState.SKIPPED}
    assert period.counts(state, NOON, NOON + timedelta(seconds=59)) == (not nothing)
    assert period.counts(state, NOON, NOON + MINUTE) == (state is RunState.QUEUED)


# -- schedules


def fired(now: datetime, state: RunState | None, *, on_duplicate: str = "return", **options: Any) -> Firing:
    schedule = Schedule(
        id="5b0f", app="app", name="n", func_name="f", options=options, next_run_at=NOON, state=ScheduleState.ACTIVE,
        **trigger_columns(Interval(MINUTE, NOON)),
    )  # fmt: skip
    holder = None if state is None else Holder(run_id="there", state=state, accepted_at=NOON - MINUTE)
    claimant = Claimant(unique=Unique(key="k", rule=rule(on_duplicate=on_duplicate)), holder=holder)
    going_on = Unfinished(count=1, run_id="mine", state=RunState.RUNNING, scheduled_for=NOON - MINUTE)
    return fire(schedule, now, going_on if options.get("overlap") == "cancel_running" else None, claimant)


def test_instant_that_is_a_duplicate_is_skipped() -> None:
    """Its row names the run; it is none of max_runs, and nothing is cancelled for it."""
    for policy in ("return", "refuse"):
        firing = fired(NOON, RunState.QUEUED, on_duplicate=policy, overlap="cancel_running", max_runs=1)

        assert (firing.new, firing.cancels, firing.replaces) == ([], None, None)
        assert [item.reason for item in firing.skipped] == [
            "duplicate: the function is unique, and run there is queued"
        ]
        assert (firing.advance.to, firing.advance.fired_now) == (ScheduleState.ACTIVE, 0)


@pytest.mark.parametrize("state", [None, *sorted(ENDED)])
def test_instant_runs_where_nothing_is_in_the_way(state: RunState | None) -> None:
    """A key without a run, or with one that has ended, keeps nobody away."""
    firing = fired(NOON, state)

    assert (len(firing.new), firing.skipped, firing.replaces) == (1, [], None)


def test_instant_replaces_what_is_there() -> None:
    """Also what another schedule or a call asked for."""
    firing = fired(NOON, RunState.RUNNING, on_duplicate="replace")

    assert (len(firing.new), firing.skipped, firing.replaces) == (1, [], "there")


def test_of_several_missed_instants_one_runs() -> None:
    """All have the schedule's arguments: the first runs, with replace the last; each of the others has its row."""
    for policy, minute in (("return", 0), ("replace", 3)):
        firing = fired(NOON + 3 * MINUTE, None, on_duplicate=policy, misfire="all", overlap="allow")

        assert [item.scheduled_for for item in firing.new] == [NOON + minute * MINUTE]
        assert {item.scheduled_for for item in firing.skipped} == {NOON + n * MINUTE for n in range(4) if n != minute}
        assert {item.reason for item in firing.skipped} == {
            f"duplicate: the function is unique, and run {firing.new[0].id} is pending"
        }
