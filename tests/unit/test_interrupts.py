"""Signals that end beat wait until its tick is over."""

import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from llmtasks.beat.interrupts import undisturbed


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers as beat has them, which raise SystemExit where they are called."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(number)

    for number in before:
        signal.signal(number, end)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_waits_until_the_block_is_left() -> None:
    """The block runs to its end, then the usual handler is called."""
    done: list[str] = []

    def tick() -> None:
        with undisturbed():
            signal.raise_signal(signal.SIGTERM)
            done.append("to the end")

    with pytest.raises(SystemExit) as ended:
        tick()

    assert done == ["to the end"]
    assert ended.value.code == signal.SIGTERM


def test_a_second_signal_passes_at_once() -> None:
    """Whoever presses Ctrl-C twice is not kept waiting."""
    done: list[str] = []

    def tick() -> None:
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("not reached")

    with pytest.raises(SystemExit):
        tick()

    assert done == []


def test_without_a_signal_nothing_changes() -> None:
    """The handlers are those of before, in the block's thread and in others."""
    before = signal.getsignal(signal.SIGTERM)

    with undisturbed():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere() -> None:
        with undisturbed():
            assert signal.getsignal(signal.SIGTERM) is before

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
