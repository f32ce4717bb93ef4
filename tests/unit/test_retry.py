"""Retrying inside one attempt, sync and async, and the delays between."""

import asyncio
import functools
import inspect
import logging
import math
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded, Terminated, TimeLimitExceeded

from llmtasks.errors import InvalidOptionError
from llmtasks.retry import backoff_delay, retry_with_backoff

#: Retries at once: no test has to wait.
at_once = functools.partial(retry_with_backoff, base_delay=0)


class Flaky:
    """Fails with the given errors, one a call, and then returns its arguments."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.calls = 0

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return args, kwargs

    def sync(self) -> Callable[..., Any]:
        def fetch(*args: Any, **kwargs: Any) -> Any:
            """Fetch it."""
            return self.answer(*args, **kwargs)

        return fetch

    def asynchronous(self) -> Callable[..., Any]:
        async def fetch(*args: Any, **kwargs: Any) -> Any:
            """Fetch it."""
            await asyncio.sleep(0)
            return self.answer(*args, **kwargs)

        return fetch

    def awaitable(self) -> Callable[..., Any]:
        def fetch(*args: Any, **kwargs: Any) -> Awaitable[Any]:
            """Fetch it."""
            return asyncio.ensure_future(self.asynchronous()(*args, **kwargs))

        return fetch

    def instance(self) -> Callable[..., Any]:
        class Fetch:
            """Fetch it."""

            async def __call__(_, *args: Any, **kwargs: Any) -> Any:
                return await self.asynchronous()(*args, **kwargs)

        return Fetch()


KINDS = ["sync", "asynchronous", "awaitable", "instance"]


async def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    return await result if inspect.isawaitable(result) else result


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def of_kind(flaky: Flaky, kind: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(flaky, kind)()
    return function


# --- retrying ---


async def test_a_function_is_called_again_until_it_returns(kind: str) -> None:
    """Two failures and a success make three calls, and the arguments are there each time."""
    flaky = Flaky(OSError("down"), ValueError("odd"))

    result = await call(at_once()(of_kind(flaky, kind)), 1, key="value")

    assert result == ((1,), {"key": "value"})
    assert flaky.calls == 3


async def test_the_last_error_is_raised_itself(kind: str) -> None:
    """After the last retry the caller gets the very error of the last call, with its traceback."""
    errors = [OSError(str(number)) for number in range(5)]
    flaky = Flaky(*errors)

    with pytest.raises(OSError, match="2") as caught:
        await call(at_once(max_retries=2)(of_kind(flaky, kind)))

    assert caught.value is errors[2]
    assert flaky.calls == 3
    assert caught.traceback[-1].name == "answer"


async def test_no_retries_means_one_call(kind: str) -> None:
    """``max_retries=0`` turns retrying off."""
    flaky = Flaky(OSError("down"))

    with pytest.raises(OSError, match="down"):
        await call(at_once(max_retries=0)(of_kind(flaky, kind)))

    assert flaky.calls == 1


async def test_only_the_named_errors_are_retried(kind: str) -> None:
    """An error outside ``retry_on`` is raised at once; its subclasses count as named."""
    flaky = Flaky(ConnectionResetError(), KeyError("name"), OSError())

    with pytest.raises(KeyError):
        await call(at_once(retry_on=(OSError, ValueError))(of_kind(flaky, kind)))

    assert flaky.calls == 2


@pytest.mark.parametrize(
    "error",
    [
        Retry(),
        Ignore(),
        Reject(),
        SoftTimeLimitExceeded(),
        TimeLimitExceeded(),
        Terminated(),
        asyncio.CancelledError(),
        GeneratorExit(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("kind", ["sync", "asynchronous"])
async def test_what_steers_a_task_is_never_retried(kind: str, error: BaseException) -> None:
    """Celery's own exceptions, time limits and cancellation pass through at the first call."""
    flaky = Flaky(error)

    with pytest.raises(type(error)) as caught:
        await call(at_once()(of_kind(flaky, kind)))

    assert caught.value is error
    assert flaky.calls == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["KeyboardInterrupt", "SystemExit"])
def test_an_exit_is_never_retried(error: BaseException) -> None:
    """Ctrl-C and sys.exit end the function as if it had no retries."""
    flaky = Flaky(error)

    with pytest.raises(type(error)):
        at_once()(flaky.sync())()

    assert flaky.calls == 1


async def test_a_cancelled_wait_ends_the_retries() -> None:
    """Cancelling during the wait between two calls raises CancelledError at once."""
    flaky = Flaky(OSError(), OSError())
    failed = asyncio.Event()

    @retry_with_backoff(base_delay=3600, max_delay=3600)
    async def fetch() -> None:
        failed.set()
        flaky.answer()

    task = asyncio.ensure_future(fetch())
    await failed.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert flaky.calls == 1


async def test_calls_at_the_same_time_count_their_own_retries() -> None:
    """Concurrent calls of one function do not share attempts."""
    tries: dict[int, int] = {}

    @at_once(max_retries=2)
    async def fetch(key: int) -> int:
        tries[key] = tries.get(key, 0) + 1
        await asyncio.sleep(0)
        if tries[key] < 3:
            raise OSError
        return key

    assert await asyncio.gather(*map(fetch, range(20))) == list(range(20))
    assert set(tries.values()) == {3}


def test_a_function_may_call_itself() -> None:
    """A recursive call has retries of its own."""
    tries: list[int] = []

    @at_once(max_retries=1)
    def countdown(number: int) -> int:
        tries.append(number)
        if tries.count(number) == 1:
            raise OSError
        return countdown(number - 1) if number else 0

    assert countdown(2) == 0
    assert tries == [2, 2, 1, 1, 0, 0]


def test_threads_count_their_own_retries() -> None:
    """One decorated function called from several threads keeps its attempts apart."""
    local = threading.local()
    results: list[int] = []

    @at_once(max_retries=3)
    def fetch() -> int:
        local.tries = getattr(local, "tries", 0) + 1
        if local.tries < 4:
            raise OSError
        return int(local.tries)

    threads = [threading.Thread(target=lambda: results.append(fetch())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert results == [4] * 8


def test_each_retry_is_logged_with_its_facts(caplog: pytest.LogCaptureFixture) -> None:
    """A constant sentence with the function, the attempt, the delay and the error; nothing for the last failure."""
    flaky = Flaky(*(OSError(str(number)) for number in range(3)))

    with caplog.at_level(logging.INFO, logger="llmtasks.retry"), pytest.raises(OSError, match="2"):
        at_once(max_retries=2)(flaky.sync())()

    records = [vars(record) for record in caplog.records]
    assert [record["message"] for record in records] == ["call failed, trying again"] * 2
    assert [(record["attempt"], record["error"]) for record in records] == [(1, "OSError('0')"), (2, "OSError('1')")]
    assert all(record["function"].endswith("fetch") and record["delay"] == 0 for record in records)


# --- the wrapper ---


@pytest.mark.parametrize("kind", ["sync", "asynchronous", "awaitable"])
def test_the_wrapper_looks_like_the_function(kind: str) -> None:
    """Name, docstring and signature stay, and async stays async."""
    function = of_kind(Flaky(), kind)

    wrapped = at_once()(function)

    assert (wrapped.__name__, wrapped.__doc__) == ("fetch", "Fetch it.")
    assert inspect.signature(wrapped) == inspect.signature(function)
    assert inspect.iscoroutinefunction(wrapped) is (kind == "asynchronous")


def test_the_decorator_works_bare_on_a_plain_function() -> None:
    """``@retry_with_backoff`` without parentheses is the decorator with its defaults."""

    @retry_with_backoff
    def double(number: int) -> int:
        return 2 * number

    assert double(4) == 8


async def test_the_decorator_works_bare_on_a_coroutine_function() -> None:
    """``@retry_with_backoff`` without parentheses keeps a coroutine function one."""

    @retry_with_backoff
    async def double(number: int) -> int:
        return 2 * number

    assert await double(4) == 8


async def test_methods_and_partials_are_retried_too() -> None:
    """A method in a class body gets its self; a partial of a coroutine function stays async."""

    class Client:
        tries = 0

        @at_once()
        async def fetch(self, factor: int) -> int:
            self.tries += 1
            if self.tries < 3:
                raise OSError
            return factor * self.tries

    assert await Client().fetch(2) == 6
    assert await at_once()(functools.partial(Client().fetch, 3))() == 9


# --- what is refused ---


async def stream() -> AsyncIterator[int]:
    yield 1


def generate() -> Iterator[int]:
    yield 1


class Stream:
    async def __call__(self) -> AsyncIterator[int]:
        yield 1


@pytest.mark.parametrize("function", [stream, generate, functools.partial(stream), Stream()])
def test_generators_are_refused(function: Any) -> None:
    """What fails while it is iterated cannot be retried by calling it again."""
    with pytest.raises(InvalidOptionError, match=r"not a generator\. A generator fails while it is iterated"):
        retry_with_backoff(function)


@pytest.mark.parametrize("function", [5, ValueError, "name"])
def test_options_without_their_names_are_refused(function: Any) -> None:
    """A first argument that is no function gets the hint how to write it."""
    with pytest.raises(InvalidOptionError, match=r"Options need their names: retry_with_backoff\(max_retries=5\)"):
        retry_with_backoff(function)


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_a_static_or_class_method_is_refused(kind: Any) -> None:
    """The decorator belongs below @staticmethod and @classmethod."""
    with pytest.raises(InvalidOptionError, match=f"below @{kind.__name__}"):
        retry_with_backoff(kind(generate))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_retries": -1}, "max_retries=-1: expected a whole number, 0 or more"),
        ({"max_retries": 1.5}, "max_retries=1.5"),
        ({"max_retries": True}, "max_retries=True"),
        ({"max_retries": None}, "max_retries=None"),
        ({"base_delay": -1}, "base_delay=-1: expected a number of seconds, 0 or more"),
        ({"base_delay": "1"}, "base_delay='1'"),
        ({"max_delay": math.inf}, "max_delay=inf"),
        ({"max_delay": math.nan}, "max_delay=nan"),
        ({"max_delay": True}, "max_delay=True"),
        ({"base_delay": 90}, "max_delay=60.0: expected at least base_delay, which is 90"),
        ({"retry_on": ()}, r"retry_on=\(\): expected an Exception class or a tuple of them"),
        ({"retry_on": "ValueError"}, "retry_on='ValueError'"),
        ({"retry_on": (ValueError, int)}, "expected an Exception class"),
        ({"retry_on": KeyboardInterrupt}, "which are no Exception, are never retried"),
        ({"retry_on": ValueError("x")}, "expected an Exception class"),
    ],
)
def test_a_bad_option_is_refused_when_the_decorator_is_made(options: dict[str, Any], message: str) -> None:
    """Mistakes show at import, not at the first failure."""
    with pytest.raises(InvalidOptionError, match=message):
        retry_with_backoff(**options)


# --- delays ---


@pytest.mark.parametrize(("attempt", "longest"), [(1, 2), (2, 4), (3, 8), (4, 10), (5_000, 10), (10**30, 10)])
def test_delays_spread_from_nothing_to_a_doubling_bound(attempt: int, longest: float) -> None:
    """The wait lies between 0 and base * 2 ** (attempt - 1), capped, and uses that whole range."""
    drawn = [backoff_delay(attempt, base=2, cap=10) for _ in range(500)]

    assert 0 <= min(drawn) < longest * 0.1
    assert longest * 0.9 < max(drawn) <= longest


def test_there_is_no_delay_before_the_first_attempt() -> None:
    """Attempts count from 1."""
    with pytest.raises(InvalidOptionError, match="attempt=0: expected 1 for the first attempt"):
        backoff_delay(0)


# --- import ---


def test_who_does_not_retry_does_not_load_tenacity() -> None:
    """Importing the module is cheap, and retrying works where no Celery app exists."""
    program = (
        "import sys, llmtasks.retry;"
        "assert 'tenacity' not in sys.modules;"
        "f = llmtasks.retry.retry_with_backoff(lambda: 1);"
        "import celery._state; assert f() == 1 and celery._state.default_app is None"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
