"""The load: what an application asks for, and what of it was accepted."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from celery import chain, chord

from llmtasks import Task
from llmtasks.errors import LLMTasksError
from tests.soak.plan import Step


@dataclass(slots=True)
class Asked:
    """What was asked for. What raised is no promise: it may be there or not."""

    #: By the load's name.
    accepted: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    #: Ids of the runs that were accepted.
    runs: set[str] = field(default_factory=set)
    #: Ids of runs of which somebody asked that they be cancelled.
    cancelled: set[str] = field(default_factory=set)
    #: Ids of one-offs.
    one_offs: set[str] = field(default_factory=set)
    #: What the last run of a chord or a chain gives, by its id.
    results: dict[str, int] = field(default_factory=dict)
    #: Ids of the bodies of chords.
    bodies: set[str] = field(default_factory=set)


class Load:
    """Asks a project for runs, in every way that there is."""

    def __init__(self, tasks: Any) -> None:
        self.asked = Asked()
        self._tasks = tasks
        self._stored: Task | None = None
        self._ways: dict[str, Callable[[Step], None]] = {
            "delay": lambda step: self._send("quick", step.number),
            "slow": lambda step: self._send("slow", step.seconds * 3),
            "retries": lambda step: self._send("shaky", step.number % 3 + 1),
            "pair": lambda step: self._send("pair", step.seconds / 4),
            "single": lambda step: self._send("single", step.seconds / 4),
            "unique": self._unique,
            "cancel": self._cancel,
            "one-off": self._one_off,
            "execute_now": self._execute_now,
            "chord": self._chord,
            "chain": self._chain,
        }

    def do(self, step: Step) -> None:
        """Ask for one thing; an error that says that a server is away is an answer."""
        try:
            self._ways[step.what](step)
        except (LLMTasksError, OSError, RuntimeError) as error:
            # RuntimeError is what the Redis result backend makes of a connection error.
            if isinstance(error, RuntimeError) and "reconnect" not in str(error):
                raise
            counted = self.asked.refused
        else:
            counted = self.asked.accepted
        counted[step.what] = counted.get(step.what, 0) + 1

    def _send(self, name: str, *args: Any) -> str:
        run_id: str = self._tasks[name].apply_async(args, task_id=str(uuid.uuid4())).id
        self.asked.runs.add(run_id)
        return run_id

    def _unique(self, step: Step) -> None:
        # Often the run that is there already.
        self.asked.runs.add(self._tasks["unique"].delay("the same", step.seconds / 2).id)

    def _cancel(self, step: Step) -> None:
        run_id = self._send("slow", step.seconds * 4)
        self.asked.cancelled.add(run_id)
        Task.cancel_run_sync(run_id, "the soak changed its mind")

    def _one_off(self, step: Step) -> None:
        at = datetime.now(UTC) + timedelta(seconds=0.2 + step.seconds)
        task = Task(func_name="quick", params={"value": step.number}, scheduled_at=at).save_sync()
        self.asked.one_offs.add(task.id or "")

    def _execute_now(self, step: Step) -> None:
        if self._stored is None:
            self._stored = Task(func_name="quick", params={"value": 0}, interval_minutes=600).save_sync()
        self.asked.runs.add(self._stored.execute_now_sync().id)

    def _chord(self, step: Step) -> None:
        numbers = range(step.number % 4 + 2)
        body = chord([self._tasks["quick"].s(number) for number in numbers])(self._tasks["total"].s())
        self.asked.runs.update([body.id, *(item.id for item in body.parent.results)])
        self.asked.bodies.add(body.id)
        self.asked.results[body.id] = sum(numbers)

    def _chain(self, step: Step) -> None:
        last = chain(self._tasks["quick"].s(step.number), self._tasks["plus"].s(1), self._tasks["plus"].s(2))()
        self.asked.results[last.id] = step.number + 3
        item = last
        while item is not None:
            self.asked.runs.add(item.id)
            item = item.parent
