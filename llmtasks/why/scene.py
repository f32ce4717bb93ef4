"""Who is there when a question is asked: processes, the broker."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cached_property

from llmtasks import sender
from llmtasks.dispatch import Station
from llmtasks.errors import BrokerUnavailableError
from llmtasks.states import PauseKind
from llmtasks.store import pauses, processes
from llmtasks.store.pauses import Pause
from llmtasks.store.processes import Process
from llmtasks.why.explanation import Fact
from llmtasks.wording import duration, listed


class Scene:
    """The app's processes and broker at one instant, each asked when it matters first.

    Attributes:
        at: The app, its settings and its database.
        now: The instant, by the database's clock.
        alive: The workers and beats that live.
    """

    def __init__(self, at: Station) -> None:
        self.at = at
        self.now: datetime = at.database.now()
        with at.database.reading() as connection:
            self.alive = processes.alive(connection, at.name, self.now - at.settings.lease_time)

    @property
    def workers(self) -> list[Process]:
        """The workers that live."""
        return [process for process in self.alive if process.kind == "worker"]

    @property
    def beats(self) -> list[Process]:
        """The beats that live."""
        return [process for process in self.alive if process.kind == "beat"]

    @cached_property
    def broker_fault(self) -> str | None:
        """What is wrong with the broker; None where it answers."""
        try:
            with sender.answering(self.at.app):
                return None
        except BrokerUnavailableError as error:
            return str(error)

    @cached_property
    def consumed(self) -> Mapping[str, frozenset[str]]:
        """The queues of each live worker that answers; empty where the broker is away."""
        try:
            return sender.consumed_queues(self.at.app, [worker.name for worker in self.workers])
        except BrokerUnavailableError:
            return {}

    @cached_property
    def pauses(self) -> list[Pause]:
        """What is paused."""
        with self.at.database.reading() as connection:
            return pauses.find(connection, self.at.name)

    def pause_of(self, kind: PauseKind, name: str) -> Pause | None:
        """The pause of a function or a queue; None where it is not paused."""
        return next((pause for pause in self.pauses if pause.kind is kind and pause.name == name), None)

    def messages_in(self, queue: str) -> int | None:
        """How many messages a queue has; None where nobody can say."""
        try:
            return sender.queue_length(self.at.app, queue)
        except BrokerUnavailableError:
            return None

    def ago(self, instant: datetime) -> str:
        """How long ago an instant was."""
        return f"{duration(max(0.0, (self.now - instant).total_seconds()))} ago"

    def until(self, instant: datetime) -> str:
        """In how long an instant will be."""
        return f"in {duration(max(0.0, (instant - self.now).total_seconds()))}"

    def process_facts(self) -> list[Fact]:
        """Who is alive."""
        return [
            Fact(name="workers alive", value=listed(worker.name for worker in self.workers) or "none"),
            Fact(name="beats alive", value=listed(beat.name for beat in self.beats) or "none"),
        ]

    def broker_facts(self) -> list[Fact]:
        """That the broker is away, where it is."""
        return [] if self.broker_fault is None else [Fact(name="broker", value=self.broker_fault)]
