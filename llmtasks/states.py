"""States of runs and schedules, which may follow which, and Celery's names for them."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class RunState(StrEnum):
    """Where one run stands."""

    #: Recorded with a row in the outbox; nobody has published it yet.
    PENDING = "pending"
    #: The broker has its message.
    QUEUED = "queued"
    #: No slot was free, or its function is paused; it starts when one is handed to it, or when the function is resumed.
    WAITING = "waiting"
    #: A worker holds it.
    RUNNING = "running"
    #: An attempt ended without success; the next one has a stored time.
    RETRYING = "retrying"
    #: The function returned.
    SUCCEEDED = "succeeded"
    #: The last attempt failed, timed out or was lost.
    FAILED = "failed"
    #: Somebody cancelled or revoked it.
    CANCELLED = "cancelled"
    #: A policy decided that it does not run; the reason says which.
    SKIPPED = "skipped"

    @property
    def is_final(self) -> bool:
        """Whether no other state can follow."""
        return self in ENDED


class PauseKind(StrEnum):
    """What is paused in the whole cluster."""

    #: No attempt of it starts.
    FUNCTION = "function"
    #: No worker consumes it.
    QUEUE = "queue"


class ScheduleState(StrEnum):
    """Where one schedule stands."""

    #: It fires at its instants.
    ACTIVE = "active"
    #: Somebody paused it; it has no next run until it is resumed.
    PAUSED = "paused"
    #: A one-off that fired, a schedule past its end, or one that left the code.
    COMPLETED = "completed"
    #: Somebody cancelled it.
    CANCELLED = "cancelled"


#: States in which a claim may take a run for its next attempt.
CLAIMABLE: Final = frozenset({RunState.PENDING, RunState.QUEUED})
#: States in which nothing runs yet and nothing has ended.
UNSTARTED: Final = frozenset({RunState.PENDING, RunState.QUEUED, RunState.WAITING, RunState.RETRYING})
#: States that no other state follows.
ENDED: Final = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.SKIPPED})
#: States of a run that still has to end.
LIVE: Final = frozenset(RunState) - ENDED

#: ``FOLLOWS[state]`` are the states from which ``state`` can be reached.
FOLLOWS: Final[dict[RunState, frozenset[RunState]]] = {
    RunState.PENDING: frozenset({RunState.RUNNING, RunState.RETRYING, RunState.WAITING, RunState.QUEUED}),
    RunState.QUEUED: frozenset({RunState.PENDING, RunState.RUNNING}),
    RunState.WAITING: CLAIMABLE,
    # A message can outrun the mark that says it was published, hence PENDING.
    RunState.RUNNING: CLAIMABLE,
    RunState.RETRYING: frozenset({RunState.RUNNING}),
    RunState.SUCCEEDED: frozenset({RunState.RUNNING}),
    RunState.FAILED: frozenset({RunState.RUNNING, *UNSTARTED}),
    RunState.CANCELLED: frozenset({RunState.RUNNING, *UNSTARTED}),
    RunState.SKIPPED: frozenset({RunState.RUNNING, *CLAIMABLE}),
}

#: What Celery's result backends, events and Flower call the same thing.
CELERY_STATE: Final[dict[RunState, str]] = {
    RunState.PENDING: "PENDING",
    RunState.QUEUED: "PENDING",
    RunState.WAITING: "PENDING",
    RunState.RUNNING: "STARTED",
    RunState.RETRYING: "RETRY",
    RunState.SUCCEEDED: "SUCCESS",
    RunState.FAILED: "FAILURE",
    RunState.CANCELLED: "REVOKED",
    RunState.SKIPPED: "IGNORED",
}
