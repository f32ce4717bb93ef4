"""Forking: a child uses connections of its own, and nobody forks while a thread is in the database."""

import os
import threading
import time
import warnings
from collections.abc import Callable

import pytest

from llmtasks.states import RunState
from llmtasks.store import forking
from llmtasks.store.database import Database
from llmtasks.store.forking import ForkGate, fork_gate
from tests.store.rows_of import new_run, opened, owed, state_of
from tests.waiting import wait_until


def fork(work: Callable[[], bool]) -> bool:
    """Do ``work`` in a child; returns its answer."""
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads, which is what is tried here.
        warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


def test_child_has_connections_of_its_own(database: Database) -> None:
    """What parent and child write after a fork is there, and neither breaks the other's connection."""
    opened(database, new_run("before"))

    def child() -> bool:
        opened(database, new_run("child"))
        return state_of(database, "before") is RunState.PENDING and database.now() is not None

    for _ in range(3):
        assert fork(lambda: len(owed(database)) >= 1)
    assert fork(child)

    opened(database, new_run("parent"))
    assert sorted(owed(database)) == ["before", "child", "parent"]


def test_childs_child_has_connections_of_its_own(database: Database) -> None:
    """A fork of a fork is as safe."""
    opened(database, new_run("before"))

    assert fork(
        lambda: len(owed(database)) == 1 and fork(lambda: len(owed(database)) == 1) and len(owed(database)) == 1
    )
    assert len(owed(database)) == 1


def test_child_survives_a_fork_beside_busy_threads(database: Database) -> None:
    """Threads that write all the time leave no child with a lock that nobody releases."""
    opened(database, new_run("a"))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with database.transaction():
                pass

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        answers = [fork(lambda: len(owed(database)) == 1) for _ in range(10)]
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)

    assert answers == [True] * 10


def test_fork_waits_for_a_thread_that_is_inside() -> None:
    """The child is made when the block is left, and its gate is open."""
    inside, leave, left = threading.Event(), threading.Event(), threading.Event()

    def stay() -> None:
        with fork_gate.entered():
            inside.set()
            leave.wait(30)
            left.set()

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(30)
    threading.Timer(0.3, leave.set).start()

    def child() -> bool:
        with fork_gate.entered(), fork_gate.entered():
            return left.is_set()

    assert fork(child)
    thread.join(30)


def test_nobody_enters_while_a_process_forks() -> None:
    """Who comes during a fork waits for its end; who is inside may go deeper."""
    gate = ForkGate()
    entered = threading.Event()

    def enter() -> None:
        with gate.entered():
            entered.set()

    with gate.entered():
        gate._close()  # our own thread being inside does not keep it from forking
        with gate.entered():
            pass
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
        gate._open()
        wait_until(entered.is_set, 30, "the waiting thread to enter")
    thread.join(30)


def test_fork_is_not_delayed_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that never leaves delays a fork by a bounded time."""
    monkeypatch.setattr(forking, "FORK_PATIENCE", 0.1)
    leave, inside = threading.Event(), threading.Event()

    def stay() -> None:
        with fork_gate.entered():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(30)
    started = time.monotonic()

    assert fork(lambda: True)

    assert time.monotonic() - started < 5
    leave.set()
    thread.join(30)
