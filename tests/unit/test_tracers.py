"""Tracers on a loop: synchronous code in greenlets that waits for coroutines, with one outcome each."""

import asyncio
import contextvars
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from celery.utils.threads import LocalStack
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtasks import bridge
from llmtasks.bridge import Body, Gathering, NotYours, Tracer, Wish

Outcome = tuple[Any, BaseException | None]
VALUE = contextvars.ContextVar("value", default="nobody's")


@dataclass(eq=False)
class Run:
    """A run that is traced, and how it ended."""

    trace: Callable[[], Any]
    outcomes: list[Outcome] = field(default_factory=list)

    def end(self, value: Any, error: BaseException | None) -> None:
        self.outcomes.append((value, error))


async def traced(*functions: Callable[[], Any]) -> list[Outcome]:
    """The outcomes of functions that are all traced on this loop at the same time."""
    return [outcome for run in await runs_of(*functions) for outcome in run.outcomes]


async def runs_of(*functions: Callable[[], Any]) -> list[Run]:
    """Functions that were all traced on this loop at the same time, to their ends."""
    loop = asyncio.get_running_loop()
    runs = [Run(function) for function in functions]
    with ThreadPoolExecutor(2) as executor:
        for run in runs:
            Tracer(run, loop, executor).proceed()
        async with asyncio.timeout(30):
            while not all(run.outcomes for run in runs):
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.005)  # whatever would end a run once more has its chance
    assert [len(run.outcomes) for run in runs] == [1] * len(runs)
    return runs


async def nap(value: Any = None) -> Any:
    await asyncio.sleep(0.001)
    return value


async def test_tracers_wait_for_coroutines_side_by_side() -> None:
    """Two runs meet although each of them is synchronous and has but this thread."""
    barrier = asyncio.Barrier(2)

    async def meet(name: str) -> str:
        async with asyncio.timeout(10):
            await barrier.wait()
        return name

    outcomes = await traced(*(lambda name=name: bridge.call(meet, (name,), {}, Body()) for name in "ab"))

    assert outcomes == [("a", None), ("b", None)]


async def test_ended_run_is_free_at_once() -> None:
    """No circle of references keeps a run, its body or its coroutine's values until the garbage collector comes."""

    class Value:
        pass

    class WatchedBody(Body):
        pass

    bodies = WeakSet[WatchedBody]()
    values = WeakSet[Value]()

    async def hold(value: Value) -> None:
        await asyncio.sleep(0.001)

    def run() -> None:
        body, value = WatchedBody(soft_limit=60), Value()
        bodies.add(body)
        values.add(value)
        bridge.call(hold, (value,), {}, body)

    gc.disable()
    try:
        ended = await runs_of(run, run)
        assert [run.outcomes for run in ended] == [[(None, None)]] * 2
        runs = WeakSet(ended)
        del ended
        await asyncio.sleep(0)  # the last callbacks of the loop are over
        assert not [*runs, *bodies, *values]
    finally:
        gc.enable()


async def test_blocking_call_leaves_the_loop_free() -> None:
    """What a tracer has done in a thread may wait for what only the loop can do."""
    loop = asyncio.get_running_loop()
    told = threading.Event()
    loop.call_later(0.05, told.set)

    outcomes = await traced(lambda: bridge.in_thread(lambda: (told.wait(10), threading.current_thread().name)))

    assert outcomes[0][0][0] is True
    assert outcomes[0][0][1] != threading.current_thread().name


async def test_each_tracer_has_a_context_of_its_own() -> None:
    """What one run sets neither another run nor the code that started it sees; threads of the run see it."""

    def run(name: str) -> list[str]:
        before = VALUE.get()
        VALUE.set(name)
        bridge.call(nap, (), {}, Body())
        return [before, VALUE.get(), bridge.in_thread(VALUE.get)]

    outcomes = await traced(lambda: run("a"), lambda: run("b"))

    assert [value for value, _ in outcomes] == [["nobody's", "a", "a"], ["nobody's", "b", "b"]]
    assert VALUE.get() == "nobody's"


async def test_celerys_stacks_know_tracers_apart() -> None:
    """What a tracer pushes is on top for its coroutine, its children and its threads, and for nobody else."""
    stack: Any = LocalStack()
    bridge.identify(stack)

    async def look() -> list[Any]:
        await asyncio.sleep(0.01)
        children = await asyncio.gather(nap(), asyncio.create_task(asyncio.to_thread(lambda: stack.top)))
        return [stack.top, children[1]]

    def run(name: str) -> list[Any]:
        stack.push(name)
        try:
            return [*bridge.call(look, (), {}, Body()), stack.top, bridge.in_thread(lambda: stack.top)]
        finally:
            stack.pop()

    outcomes = await traced(lambda: run("a"), lambda: run("b"))

    assert [value for value, _ in outcomes] == [["a"] * 4, ["b"] * 4]
    assert stack.top is None


async def test_hard_limit_stops_the_waiting() -> None:
    """A coroutine that goes on after its hard limit is told to stop, and nobody waits for it."""
    ended = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.sleep(30)
        except SoftTimeLimitExceeded:
            pass
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    body = Body(soft_limit=0.05, hard_limit=0.1)
    ((_, error),) = await traced(lambda: bridge.call(stubborn, (), {}, body))

    assert isinstance(error, TimeLimitExceeded)
    await asyncio.wait_for(ended.wait(), 10)


async def test_synchronous_wait_on_a_loop_is_refused() -> None:
    """A loop that waited for its own coroutine would stand still; the error says what to do instead."""
    with pytest.raises(RuntimeError, match="await the task function"):
        bridge.call(nap, (), {}, Body())


class _Doubling(Gathering[int]):
    name = "doubling"
    most = 3

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gate = threading.Event()
        super().__init__(None)

    def key(self, asked: int) -> int:
        return asked

    def fulfil(self, group: list[Wish[int]]) -> None:
        self.gate.wait(10)
        self.groups.append([wish.asked for wish in group])
        if any(wish.asked < 0 for wish in group):
            raise ValueError("negative")
        for wish in group:
            wish.answer = 2 * wish.asked


async def test_what_gathers_is_done_in_one_go() -> None:
    """No group is larger than agreed or has the same key twice, and each wish gets its own answer."""
    doubling = _Doubling()
    asked = [1, 2, 3, 4, 5, 5, 6, -1]
    futures = [doubling.ask(number) for number in asked]
    doubling.gate.set()

    answers = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 10)

    assert answers[:5] == [2, 4, 6, 8, 10]
    assert [number for group in doubling.groups for number in group] == asked
    assert all(len(group) <= 3 and len(set(group)) == len(group) for group in doubling.groups)
    assert isinstance(answers[-1], ValueError)


async def test_wish_that_is_given_up_hurts_no_other() -> None:
    """Somebody who stops waiting takes nothing from the rest of the group."""
    doubling = _Doubling()
    first, second = doubling.ask(1), doubling.ask(2)
    first.cancel()
    doubling.gate.set()

    assert await asyncio.wait_for(second, 10) == 4


STEPS = st.lists(st.sampled_from(["yield", "sleep", "child", "thread", "shield"]), max_size=4)
ENDS = st.sampled_from(["return", "raise", "cancel self", "swallow once", "forever"])
INTERRUPTIONS = st.sampled_from([None, "soft", "hard", "cancel", "cancel twice", "soft then cancel"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(STEPS, ENDS, INTERRUPTIONS, st.integers(0, 4)), min_size=1, max_size=8))
def test_every_attempt_has_one_outcome(plans: list[tuple[list[str], str, str | None, int]]) -> None:
    """Whatever a coroutine awaits, raises or swallows, and whenever it is interrupted: one outcome, and of its kind."""
    asyncio.run(_live_through(plans))


async def _live_through(plans: list[tuple[list[str], str, str | None, int]]) -> None:
    bodies = [_body_for(end, interruption) for _, end, interruption, _ in plans]
    loop = asyncio.get_running_loop()
    for body, (_, _, interruption, delay) in zip(bodies, plans, strict=True):
        if interruption and "cancel" in interruption:
            for count in range(2 if "twice" in interruption else 1):
                loop.call_later(0.002 * delay + 0.001 * count, _cancel, loop, body)

    outcomes = await traced(
        *(
            lambda steps=steps, end=end, body=body: bridge.call(_behave, (steps, end), {}, body)
            for body, (steps, end, _, _) in zip(bodies, plans, strict=True)
        )
    )

    for (value, error), (_, end, interruption, _) in zip(outcomes, plans, strict=True):
        possible = _possible(end, interruption)
        assert ("value" if error is None else type(error).__name__) in possible, (end, interruption, value, error)
    strays = asyncio.all_tasks() - {asyncio.current_task()}
    for task in strays:
        task.cancel()
    await asyncio.gather(*strays, return_exceptions=True)


def _body_for(end: str, interruption: str | None) -> Body:
    limit = interruption or ""
    endless = end in {"forever", "swallow once"} and interruption is None
    return Body(
        soft_limit=0.004 if "soft" in limit else None,
        hard_limit=0.006 if "hard" in limit else 0.02 if endless or end == "swallow once" else None,
    )


def _cancel(loop: asyncio.AbstractEventLoop, body: Body) -> None:
    if body.is_starting():
        loop.call_soon(_cancel, loop, body)
    else:
        body.interrupt(NotYours("taken"))


def _possible(end: str, interruption: str | None) -> set[str]:
    own = {
        "return": {"value"},
        "raise": {"KeyError"},
        "cancel self": {"CancelledError"},
        "swallow once": {"value"},
        "forever": set[str](),
    }[end]
    if end == "swallow once" or (end == "forever" and interruption is None):
        own = own | {"TimeLimitExceeded"}
    from_outside = {
        None: set[str](),
        "soft": {"SoftTimeLimitExceeded"},
        "hard": {"TimeLimitExceeded"},
        "cancel": {"NotYours"},
        "cancel twice": {"NotYours"},
        "soft then cancel": {"SoftTimeLimitExceeded", "NotYours"},
    }[interruption]
    return own | from_outside


async def _behave(steps: list[str], end: str) -> str:
    for step in steps:
        if step == "yield":
            await asyncio.sleep(0)
        elif step == "sleep":
            await asyncio.sleep(0.002)
        elif step == "child":
            await asyncio.gather(nap(), nap())
        elif step == "thread":
            await asyncio.to_thread(lambda: None)
        else:
            await asyncio.shield(nap())
    if end == "raise":
        raise KeyError("on purpose")
    if end == "cancel self":
        raise asyncio.CancelledError
    if end == "swallow once":
        try:
            await asyncio.sleep(30)
        except (asyncio.CancelledError, SoftTimeLimitExceeded):
            return "swallowed"
    if end == "forever":
        await asyncio.sleep(30)
    return "done"
