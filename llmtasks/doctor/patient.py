"""What the checks look at."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property

from llmtasks import sender
from llmtasks.dispatch import Station
from llmtasks.options import ResolvedOptions
from llmtasks.registry import task_registry
from llmtasks.sender import RedisServer
from llmtasks.store import processes
from llmtasks.store.processes import Process


class Patient:
    """An app with its settings and servers. What several checks need is read once, when the first one asks.

    Attributes:
        at: The app, its settings and its database.
    """

    def __init__(self, at: Station) -> None:
        self.at = at

    @cached_property
    def now(self) -> datetime:
        """The instant of the examination, by the database's clock."""
        return self.at.database.now()

    @cached_property
    def alive(self) -> list[Process]:
        """The workers and beats of the app that live."""
        with self.at.database.reading() as connection:
            return processes.alive(connection, self.at.name, self.now - self.at.settings.lease_time)

    @property
    def workers(self) -> list[Process]:
        """The workers that live."""
        return [process for process in self.alive if process.kind == "worker"]

    @property
    def beats(self) -> list[Process]:
        """The beats that live."""
        return [process for process in self.alive if process.kind == "beat"]

    @cached_property
    def consumed(self) -> Mapping[str, frozenset[str]]:
        """The queues of each live worker that answers through the broker."""
        return sender.consumed_queues(self.at.app, [worker.name for worker in self.workers])

    @cached_property
    def redis(self) -> RedisServer | None:
        """How the broker keeps messages; None where it is no Redis."""
        return sender.redis_server(self.at.app)

    @cached_property
    def functions(self) -> Mapping[str, ResolvedOptions]:
        """The registered task functions of this process with their numbers in force."""
        defaults = self.at.settings.tasks
        return {name: task_registry.options(name).with_defaults(defaults) for name in task_registry.names()}

    @cached_property
    def timed_sync_functions(self) -> list[str]:
        """The plain functions that were registered with a time limit of their own."""
        found: list[str] = []
        for name in task_registry.names():
            options = task_registry.options(name)
            limited = options.timeout is not None or {"time_limit", "soft_time_limit"} & set(options.celery)
            if limited and not inspect.iscoroutinefunction(task_registry.function(name)):
                found.append(name)
        return found
