"""Coroutines that go on although they were told to stop are told again, counted, and named once."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from llmtasks import bridge
from llmtasks.bridge import Body, NotYours, zombies
from llmtasks.bridge.zombies import where
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told again soon."""
    monkeypatch.setattr(zombies, "patience", 0.05)


async def swallow(times: int, told: list[BaseException]) -> str:
    """Go on after being told so many times."""
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            told.append(error)
            if len(told) > times:
                raise


def call(function: Callable[..., Any], *args: Any, body: Body) -> Any:
    return bridge.call(function, args, {}, body)


def in_main(work: Callable[[], Any]) -> Any:
    return work()


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(60)


both = pytest.mark.parametrize("place", [in_main, in_thread])


def interrupted(body: Body, place: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """Call a function and interrupt it from another thread."""
    with ThreadPoolExecutor(1) as other:
        telling = other.submit(wait_until, lambda: body.interrupt(NotYours("gone")), 30, "the coroutine to run")
        try:
            return place(lambda: call(function, *args, body=body))
        finally:
            telling.result(30)


@both
def test_coroutine_that_swallows_its_cancellation_is_told_until_it_ends(
    place: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Three times swallowed, it ends by the fourth; the log names it once, with the line where it waits."""
    told: list[BaseException] = []

    with caplog.at_level(logging.INFO), pytest.raises(NotYours):
        interrupted(Body(name="run 7 of swallow"), place, swallow, 3, told)

    assert len(told) == 4
    wait_until(lambda: "run 7 of swallow has ended" in caplog.text, 30, "its end is said")
    assert caplog.text.count("run 7 of swallow was told to stop") == 1
    assert "await asyncio.sleep(60)" in caplog.text
    assert len(zombies) == 0


@both
def test_coroutine_that_stops_is_told_once(place: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said of it."""
    told: list[BaseException] = []

    with pytest.raises(NotYours):
        interrupted(Body(), place, swallow, 0, told)

    assert len(told) == 1
    assert caplog.text == ""


@both
def test_soft_limit_may_be_caught(place: Callable[..., Any]) -> None:
    """What handles it has time until the hard limit: nobody tells it again."""

    async def handles() -> str:
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            await asyncio.sleep(0.5)  # ten times the patience
        return "handled"

    assert place(lambda: call(handles, body=Body(soft_limit=0.05))) == "handled"


def test_what_goes_on_after_its_hard_limit_is_a_zombie_until_it_ends() -> None:
    """Its run is over at the limit; the coroutine is told again, and counted while it lives."""
    told: list[BaseException] = []

    with pytest.raises(TimeLimitExceeded):
        in_thread(lambda: call(swallow, 2, told, body=Body(hard_limit=0.2)))

    wait_until(lambda: len(told) > 1 and len(zombies) == 1, 30, "it is counted")
    wait_until(lambda: len(zombies) == 0, 30, "it ended")
    assert len(told) == 3


async def test_where_a_coroutine_waits_is_its_whole_chain_of_awaits() -> None:
    """Through coroutines and async generators, outermost first."""

    async def items() -> Any:
        await asyncio.sleep(60)
        yield 1

    async def inner() -> None:
        async for _ in items():
            pass

    async def outer() -> None:
        await inner()

    coroutine = outer()
    assert "has not begun" not in where(coroutine)
    task = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0)

    shown = where(coroutine)
    task.cancel()
    assert [line.strip() for line in shown.splitlines() if line.startswith("    ")][:2] == [
        "await inner()",
        "async for _ in items():",
    ]


def test_where_of_what_is_no_coroutine_is_nowhere() -> None:
    """Such as one that has ended."""
    assert "nowhere" in where(object())
