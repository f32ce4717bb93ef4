"""The bridge: a coroutine runs to its end from sync code, on loops that last, and can be interrupted."""

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import celery
import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from llmtasks import bridge
from llmtasks.bridge import Body, NotYours
from tests.waiting import wait_until


def in_main(work: Callable[[], Any]) -> Any:
    """Call as prefork's tracer does: from the main thread."""
    assert threading.current_thread() is threading.main_thread()
    return work()


def in_thread(work: Callable[[], Any]) -> Any:
    """Call as the threads pool's tracer does."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(60)


both = pytest.mark.parametrize("place", [in_main, in_thread])


def call(function: Callable[..., Any], *args: Any, body: Body | None = None, **kwargs: Any) -> Any:
    return bridge.call(function, args, kwargs, body or Body())


@both
def test_coroutine_returns_its_value(place: Callable[..., Any]) -> None:
    """Arguments go in, the value comes out."""

    async def add(a: int, *, b: int) -> int:
        await asyncio.sleep(0)
        return a + b

    assert place(lambda: call(add, 1, b=2)) == 3


@both
def test_error_of_a_coroutine_is_raised_as_it_is(place: Callable[..., Any]) -> None:
    """With its own traceback."""

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        place(lambda: call(fail))
    assert any(entry.name == "fail" for entry in caught.traceback)


def test_sync_function_is_just_called() -> None:
    """In the caller's own thread, with no loop."""

    def where() -> int:
        return threading.get_ident()

    body = Body()
    assert call(where, body=body) == threading.get_ident()
    assert not body.is_async
    assert not body.interrupt(NotYours())


@both
def test_loop_lasts_from_one_run_to_the_next(place: Callable[..., Any]) -> None:
    """A client that was made on it in one run can be used in the next."""

    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    first, second = place(lambda: call(loop)), place(lambda: call(loop))

    assert first is second
    assert not first.is_closed()


def test_threads_share_one_loop() -> None:
    """Bodies of several tracers run side by side on it."""
    met = threading.Barrier(2)

    async def meet() -> asyncio.AbstractEventLoop:
        await asyncio.to_thread(met.wait, 30)
        return asyncio.get_running_loop()

    with ThreadPoolExecutor(2) as pool:
        loops = [job.result(60) for job in [pool.submit(call, meet) for _ in range(2)]]

    assert loops[0] is loops[1]


async def generate() -> AsyncIterator[int]:
    yield 1


def give_coroutine() -> Any:
    async def inner() -> None: ...

    return inner()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (generate, "generate is an async generator: nobody would iterate it; collect its items"),
        (give_coroutine, "give_coroutine returned coroutine, which nobody would await: declare it with `async def`"),
        (lambda: generate(), "returned async_generator, which nobody would await"),
    ],
)
def test_what_nobody_would_await_is_an_error(function: Callable[..., Any], message: str) -> None:
    """A silent success would hide that nothing ran."""
    with pytest.raises(TypeError, match=message):
        call(function)


@both
def test_soft_limit_reaches_the_coroutine(place: Callable[..., Any]) -> None:
    """It can be caught, cleaned up after, and answered with a value."""

    async def patient() -> str:
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            await asyncio.sleep(0.01)
            return "cleaned up"
        return "never"

    started = time.monotonic()
    assert place(lambda: call(patient, body=Body(soft_limit=0.1))) == "cleaned up"
    assert time.monotonic() - started < 30


@both
def test_soft_limit_that_nobody_catches_ends_the_run(place: Callable[..., Any]) -> None:
    """As Celery's own exception, which counts as a failed attempt."""

    async def endless() -> None:
        await asyncio.sleep(60)

    with pytest.raises((SoftTimeLimitExceeded, asyncio.CancelledError)) as caught:
        place(lambda: call(endless, body=Body(soft_limit=0.1)))
    assert isinstance(caught.value, SoftTimeLimitExceeded)


@both
def test_soft_limit_reaches_the_bottom_of_a_task_group(place: Callable[..., Any]) -> None:
    """What the coroutine waits for is cancelled with it."""
    ended: list[str] = []

    async def child(name: str) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(name)

    async def parent() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(child("a"))
            group.create_task(child("b"))

    with pytest.raises(BaseException):  # noqa: B017, PT011  # which one is the group's affair; that they end is ours
        place(lambda: call(parent, body=Body(soft_limit=0.1)))
    assert sorted(ended) == ["a", "b"]


@both
def test_limit_of_one_run_does_not_hit_the_next(place: Callable[..., Any]) -> None:
    """Its timer ends with it."""

    async def work(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    assert place(lambda: call(work, 0, body=Body(soft_limit=0.3))) == "done"
    assert place(lambda: call(work, 0.5)) == "done"


@both
def test_interruption_from_another_thread_is_raised_inside(place: Callable[..., Any]) -> None:
    """A heartbeat tells a coroutine that its run was given away."""
    body = Body()
    seen: list[BaseException] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            seen.append(error)
            raise

    def interrupt() -> None:
        wait_until(lambda: body.interrupt(NotYours("given away")), 30, "the coroutine to run")

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(asyncio.CancelledError):
        place(lambda: call(work, body=body))
    other.join(30)

    assert len(seen) == 1
    assert isinstance(body.interruption, NotYours)


@both
def test_context_of_the_caller_is_the_coroutines(place: Callable[..., Any]) -> None:
    """Context variables that the tracer set are seen, and what the coroutine sets stays its own."""
    variable = contextvars.ContextVar("variable", default="unset")

    async def read() -> str:
        found = variable.get()
        variable.set("inside")
        return found

    def work() -> tuple[str, str]:
        variable.set("outside")
        return call(read), variable.get()

    assert place(lambda: contextvars.copy_context().run(work)) == ("outside", "outside")


@both
def test_current_task_is_right_inside_the_coroutine(place: Callable[..., Any]) -> None:
    """So it is in its children and in threads that it starts, while runs of other tracers go on."""
    stack = celery._state._task_stack  # type: ignore[attr-defined]

    async def look() -> list[Any]:
        await asyncio.sleep(0)
        child = asyncio.create_task(asyncio.sleep(0, result=None))
        await child

        async def in_child() -> Any:
            return stack.top

        return [
            stack.top,
            await asyncio.create_task(in_child()),
            *await asyncio.gather(in_child(), in_child()),
            await asyncio.to_thread(lambda: stack.top),
        ]

    def work() -> list[Any]:
        stack.push("mine")
        try:
            return call(look)
        finally:
            stack.pop()

    assert place(work) == ["mine"] * 5


def test_function_is_named_for_people() -> None:
    """Partials have no name of their own."""

    def body() -> None: ...

    assert bridge.name_of(body).endswith("test_function_is_named_for_people.<locals>.body")
    assert "partial" in bridge.name_of(functools.partial(body))


def test_main_thread_is_not_left_with_half_a_run() -> None:
    """An error that a signal handler raises between two steps of the loop ends the coroutine too."""
    ended: list[str] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(_raise_interrupt)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cleaned up")

    def _raise_interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(work)
    assert ended == ["cleaned up"]

    async def after() -> str:
        return "next"

    assert call(after) == "next"
