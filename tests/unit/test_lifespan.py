"""Hooks of a worker's loop: what may be registered, and how they are called."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llmtasks import lifespan, on_worker_loop_start, on_worker_loop_stop
from llmtasks.bridge import loops
from llmtasks.errors import ConfigurationError


@pytest.fixture(autouse=True)
def no_hooks() -> Iterator[None]:
    """Each test begins and ends with those that were there."""
    before = list(lifespan._at_start), list(lifespan._at_stop)
    lifespan._at_start.clear()
    lifespan._at_stop.clear()
    yield
    lifespan._at_start[:], lifespan._at_stop[:] = before


def with_argument(app: object) -> None: ...


async def generator() -> Any:
    yield 1


@pytest.mark.parametrize("decorator", [on_worker_loop_start, on_worker_loop_stop])
@pytest.mark.parametrize(
    ("given", "why"),
    [
        (with_argument, "missing a required argument: 'app'"),
        (generator, "it is a generator, which nobody would iterate"),
        (None, "it cannot be called"),
    ],
)
def test_what_cannot_be_called_is_refused(decorator: Callable[..., Any], given: Any, why: str) -> None:
    """At import, with the reason, instead of at the worker's start."""
    with pytest.raises(ConfigurationError, match=f"expected a function without arguments, async or not; {why}"):
        decorator(given)


@pytest.mark.parametrize("on_own", [True, False])
def test_hooks_are_called_once_each_on_the_loop_of_the_runs(on_own: bool) -> None:
    """In order at the start, the other way round at the end; registered twice they are called once."""
    called: list[tuple[str, asyncio.AbstractEventLoop]] = []

    def hook(name: str) -> Callable[[], None]:
        return lambda: called.append((name, asyncio.get_running_loop()))

    first = hook("first")
    for function in (first, first, hook("second")):
        assert on_worker_loop_start(function) is function
    for name in ("last", "last but one"):
        on_worker_loop_stop(hook(name))

    lifespan.begin(on_own=on_own)
    lifespan.end(10)
    lifespan.end(10)

    loop = loops.own() if on_own else loops.shared()
    assert called == [(name, loop) for name in ("first", "second", "last but one", "last")]


@pytest.mark.parametrize("on_own", [True, False])
def test_stop_hooks_are_cut_off_and_not_called_where_none_was_begun(
    on_own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One that hangs is cancelled when its time is up; after a start that failed there is nothing to stop."""
    cancelled: list[str] = []

    @on_worker_loop_stop
    async def hangs() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append("hangs")
            raise

    lifespan.begin(on_own=on_own)
    lifespan.end(0.1)
    assert "they took longer than the 0.1 s that were left" in caplog.text

    @on_worker_loop_start
    def fails() -> None:
        raise OSError("no")

    with pytest.raises(lifespan.HookError, match=r"its start hook .*fails failed: OSError: no"):
        lifespan.begin(on_own=on_own)
    lifespan.end(10)
    assert cancelled == ["hangs"]
