"""Workers and beats: who lives, and what they declare."""

from datetime import timedelta
from typing import Any

from llmtasks.store import processes
from llmtasks.store.database import Database
from llmtasks.store.processes import Process
from tests.store.rows_of import APP, NOW, later


def process(process_id: str, **changes: Any) -> Process:
    values: dict[str, Any] = {
        "id": process_id, "app": APP, "kind": "worker", "name": "celery@host", "pid": 7, "pool": "prefork",
        "concurrency": 4, "started_at": NOW, "heartbeat_at": NOW, "cpu_percent": 12.5, "memory": 5_000_000_000,
    }  # fmt: skip
    return Process(**{**values, **changes})


def test_process_is_alive_while_it_stamps(database: Database) -> None:
    """A second stamp changes what it uses and when it was heard of, not when it began."""
    with database.transaction() as tx:
        processes.stamp(tx, process("a"))
        processes.stamp(tx, process("a", started_at=later(9), heartbeat_at=later(9), cpu_percent=99.0))
        processes.stamp(tx, process("b", app="other"))
        processes.stamp(tx, process("c", heartbeat_at=later(-60)))

        assert processes.alive(tx, APP, later(0)) == [process("a", heartbeat_at=later(9), cpu_percent=99.0)]


def test_beat_says_what_it_declares(database: Database) -> None:
    """Beats and workers are told apart, in the order of their starts."""
    with database.transaction() as tx:
        processes.stamp(tx, process("w"))
        processes.stamp(tx, process("b2", kind="beat", declared=("x",), started_at=later(2), pool=None))
        processes.stamp(tx, process("b1", kind="beat", declared=("emails", "report"), started_at=later(1), memory=None))

        beats = processes.alive(tx, APP, NOW, kind="beat")

    assert [(item.id, item.declared) for item in beats] == [("b1", ("emails", "report")), ("b2", ("x",))]


def test_what_a_process_knows_is_written_once_and_when_it_changed(database: Database) -> None:
    """A stamp carries only what changes while a process lives, until it is told that there is more."""
    known = {"functions": ("add", "mail"), "clock_offset": 0.5}
    with database.transaction() as tx:
        processes.stamp(tx, process("a", **known))
        processes.stamp(tx, process("a", functions=(), pool="solo", heartbeat_at=later(3), clock_offset=-7.25))
        (same,) = processes.alive(tx, APP, NOW)
        processes.stamp(tx, process("a", functions=("add",), pool="solo", heartbeat_at=later(6)), anew=True)
        (changed,) = processes.alive(tx, APP, NOW)

    assert same == process("a", functions=("add", "mail"), heartbeat_at=later(3), clock_offset=-7.25)
    assert changed == process("a", functions=("add",), pool="solo", heartbeat_at=later(6))


def test_process_that_was_forgotten_comes_back_whole(database: Database) -> None:
    """Who was silent for an hour and is heard of again has all of its row again."""
    whole = process("a", functions=("add",), declared=("nightly",))
    with database.transaction() as tx:
        processes.stamp(tx, whole)
        processes.forget_silent(tx, NOW + timedelta(hours=2))
        processes.stamp(tx, whole)

        assert processes.alive(tx, APP, NOW) == [whole]


def test_ended_and_silent_processes_are_forgotten(database: Database) -> None:
    """One leaves in order; another is forgotten long after its last stamp."""
    with database.transaction() as tx:
        for number in range(3):
            processes.stamp(tx, process(f"p{number}", heartbeat_at=later(-3_600 * number)))
        processes.leave(tx, "p0")
        processes.forget_silent(tx, NOW + timedelta(seconds=1))

        assert [item.id for item in processes.alive(tx, APP, later(-99_999))] == []
        processes.stamp(tx, process("p3", heartbeat_at=later(-3_500)))
        processes.forget_silent(tx, NOW)
        assert [item.id for item in processes.alive(tx, APP, later(-99_999))] == ["p3"]
