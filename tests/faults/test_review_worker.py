"""What must not end a worker, its loop or its heart."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from billiard.exceptions import WorkerLostError

from llmtasks import bridge
from llmtasks.attempt.calling import call_body, current
from llmtasks.bridge import Body


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """A thread as the threads pool has them."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


async def _leave() -> None:
    raise SystemExit(3)


async def _stay() -> str:
    return "here"


def test_exit_in_a_coroutine_leaves_the_shared_loop_running(thread: ThreadPoolExecutor) -> None:
    """On the threads pool ``sys.exit()`` fails its own run; the bodies of other threads go on."""
    with pytest.raises(WorkerLostError, match="SystemExit"):
        thread.submit(bridge.call, _leave, (), {}, Body()).result(30)

    assert thread.submit(bridge.call, _stay, (), {}, Body()).result(30) == "here"


def test_nested_body_does_not_take_the_handle_of_the_outer_one() -> None:
    """Whatever interrupts the outer run must find the outer body."""
    outer = Body(started=time.monotonic())
    current.body = current.untaken = outer
    try:
        assert call_body(lambda: call_body(_stay, (), {}), (), {}) == "here"
    finally:
        current.body = current.untaken = None

    assert not outer.is_async
