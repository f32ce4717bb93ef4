"""Checks of the processes that live: that there are any, their clocks, their pools."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from llmtasks import sender
from llmtasks.doctor.finding import Finding, Severity
from llmtasks.doctor.patient import Patient
from llmtasks.store import schedules
from llmtasks.wording import listed

#: Seconds by which clocks may differ; hosts that ask a time server differ by some milliseconds.
CLOCK_TOLERANCE: Final = 2.0
#: Pools that cannot interrupt a plain function, by the names of their modules in celery.concurrency.
CANNOT_INTERRUPT: Final = frozenset({"asyncio", "thread", "solo"})


def no_beat(patient: Patient) -> Iterator[Finding]:
    """Some beat lives."""
    if patient.beats:
        return
    with patient.at.database.reading() as connection:
        following = schedules.next_due(connection, patient.at.name)
    yield Finding(
        code="no-beat",
        severity=Severity.WARNING if following is None else Severity.ERROR,
        found=f"no beat of app {patient.at.name!r} gave a heartbeat within {patient.at.settings.lease:g} s",
        why="Schedules do not fire, and old runs are not deleted.",
        fix="start `celery beat`; two of them may run",
    )


def no_worker(patient: Patient) -> Iterator[Finding]:
    """Some worker lives."""
    if not patient.workers:
        yield Finding(
            code="no-worker",
            severity=Severity.ERROR,
            found=f"no worker of app {patient.at.name!r} gave a heartbeat within {patient.at.settings.lease:g} s",
            why="Nothing runs.",
            fix="start `celery worker`",
        )


def clock_skew(patient: Patient) -> Iterator[Finding]:
    """All hosts have the database's time."""
    here = (datetime.now(UTC) - patient.at.database.now()).total_seconds()
    offsets = {"this host": here} | {
        process.name: process.clock_offset for process in patient.alive if process.clock_offset is not None
    }
    wrong = {name: offset for name, offset in offsets.items() if abs(offset) > CLOCK_TOLERANCE}
    if wrong:
        said = [
            f"{name} is {abs(offset):.1f} s {'ahead' if offset > 0 else 'behind'}" for name, offset in wrong.items()
        ]
        yield Finding(
            code="clock-skew",
            severity=Severity.WARNING,
            found=f"compared with the database's clock, {listed(said)}",
            why="An instant that a host computes itself (scheduled_at, eta, expires) is off by as much, and messages "
            "expire too early or too late.",
            fix="let all hosts ask a time server (chrony, systemd-timesyncd), the database's too",
        )


def cannot_interrupt(patient: Patient) -> Iterator[Finding]:
    """No plain function with a time limit runs where nothing can stop it."""
    for worker in patient.workers:
        if worker.pool not in CANNOT_INTERRUPT:
            continue
        queues = patient.consumed.get(worker.name)
        names = [
            name
            for name in patient.timed_sync_functions
            if name in worker.functions and (queues is None or sender.queue_of(patient.at.app, name) in queues)
        ]
        if names:
            yield Finding(
                code="cannot-interrupt",
                severity=Severity.WARNING,
                found=f"{worker.name} has the {worker.pool} pool and runs {listed(names)}, "
                f"{'a plain function with a timeout' if len(names) == 1 else 'plain functions with timeouts'}",
                why="Nothing can stop a plain function there: neither its timeout nor a cancellation ends it.",
                fix="make it `async def`, or give it a queue whose worker has the prefork pool (LLMTASKS_POOL=prefork)",
            )
