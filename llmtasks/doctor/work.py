"""Checks of the work that waits: schedules and runs that nobody will take up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from llmtasks import sender
from llmtasks.doctor.finding import Finding, Severity
from llmtasks.doctor.patient import Patient
from llmtasks.states import PauseKind
from llmtasks.store import pauses, troubles
from llmtasks.wording import counted, listed

#: An end that was sent this often and has not reached Celery is in trouble: the first three take a minute.
OFTEN: Final = 4
#: Schedules set aside that are shown one by one.
SHOWN: Final = 20


def queue_without_consumer(patient: Patient) -> Iterator[Finding]:
    """Some worker consumes each queue that has runs."""
    if not patient.workers:
        return  # no-worker says it
    app = patient.at.app
    with patient.at.database.reading() as connection:
        queued = troubles.queued(connection, patient.at.name)
    runs: Counter[str] = Counter()
    for item in queued:
        runs[sender.queue_of(app, item.func_name, item.queue)] += item.runs
    routed = {sender.queue_of(app, name) for name in patient.functions}
    silent = [worker.name for worker in patient.workers if worker.name not in patient.consumed]
    consumed = frozenset[str]().union(*patient.consumed.values())
    with patient.at.database.reading() as connection:
        paused = {pause.name for pause in pauses.find(connection, patient.at.name) if pause.kind is PauseKind.QUEUE}
    for queue in sorted({*runs, *filter(None, routed)} - consumed - paused):
        messages = sender.queue_length(app, queue)
        if not messages and queue not in runs:
            continue
        waiting = f"queue {queue!r} has {counted(messages or 0, 'message')} and {counted(runs[queue], 'run')}"
        unsure = f"; {listed(silent)} did not answer and may" if silent else ""
        yield Finding(
            code="queue-without-consumer",
            severity=Severity.WARNING if silent else Severity.ERROR,
            found=f"{waiting}, and no worker that answers consumes it{unsure}",
            why="These runs do not start.",
            fix=f"start a worker with `-Q {queue}`, or `celery control add_consumer {queue}`",
        )


def function_unknown(patient: Patient) -> Iterator[Finding]:
    """Live processes know the functions of all schedules that will fire."""
    with patient.at.database.reading() as connection:
        fired = troubles.fired(connection, patient.at.name)
    by_workers = {name for worker in patient.workers for name in worker.functions}
    by_beats = {name for beat in patient.beats for name in beat.functions}
    for item in fired:
        who: list[str] = []
        if patient.workers and item.func_name not in by_workers:
            who.append("worker")
        if patient.beats and not item.handed and item.func_name not in by_beats:
            who.append("beat")
        if who:
            others = f" and {counted(item.schedules - 1, 'other schedule')}" if item.schedules > 1 else ""
            yield Finding(
                code="function-unknown",
                severity=Severity.ERROR,
                found=f"schedule {item.example!r}{others} will call {item.func_name!r}, which no live "
                f"{' and no live '.join(who)} knows",
                why="A worker that gets such a run refuses it; a beat sets such a schedule aside.",
                fix="import the module that registers it where they start (LLMTASKS_IMPORTS, Celery's `imports`), or "
                "cancel the schedule",
            )


def paused(patient: Patient) -> Iterator[Finding]:
    """No function and no queue is paused."""
    with patient.at.database.reading() as connection:
        found = pauses.find(connection, patient.at.name)
    for pause in found:
        is_queue = pause.kind is PauseKind.QUEUE
        yield Finding(
            code=f"{pause.kind}-paused",
            severity=Severity.NOTE,
            found=str(pause),
            why="No worker consumes it: its messages wait in the broker." if is_queue else "None of its runs starts.",
            fix=f"`llmtasks resume --{pause.kind} {pause.name}` when the reason is gone",
        )


def set_aside(patient: Patient) -> Iterator[Finding]:
    """No schedule was set aside."""
    with patient.at.database.reading() as connection:
        found = troubles.set_aside(connection, patient.at.name, SHOWN + 1)
    for item in found[:SHOWN]:
        yield Finding(
            code="schedule-set-aside",
            severity=Severity.ERROR,
            found=f"schedule {item.name!r} ({item.id}) is active and does not fire: {item.reason or 'no reason given'}",
            why="Beat could not fire it and left it as it is, so that the others go on.",
            fix=f"repair what its reason says, then `llmtasks resume {item.id}`",
        )
    if len(found) > SHOWN:
        yield Finding(
            code="schedule-set-aside",
            severity=Severity.ERROR,
            found=f"more than {SHOWN} schedules are set aside",
            why="Only the first ones are shown.",
            fix="`llmtasks schedules --state active` lists them, with their reasons",
        )


def end_untold(patient: Patient) -> Iterator[Finding]:
    """Each end reaches Celery at its first telling or soon after."""
    with patient.at.database.reading() as connection:
        found = troubles.untold(connection, patient.at.name, OFTEN)
    if found is not None:
        yield Finding(
            code="end-untold",
            severity=Severity.WARNING,
            found=f"{counted(found.count, 'run')} ended, and Celery was told in vain; {found.example} "
            f"{found.times} times",
            why="Who waits for the result, a link or a chord of these runs waits on, and their rows are not deleted.",
            fix=f"`llmtasks why {found.example}`; the logs of the workers say what fails: the result backend, or a "
            "function that they do not know",
        )
