"""Pausing a function or a queue in the whole cluster; what counts is a row in the database."""

from __future__ import annotations

import asyncio
from typing import TypeAlias

from llmtasks.checks import check_text
from llmtasks.dispatch import station
from llmtasks.errors import InvalidOptionError
from llmtasks.registry import task_registry
from llmtasks.states import PauseKind
from llmtasks.store import pauses
from llmtasks.store.pauses import Pause

#: ``Task`` has a method called ``list``, so annotations cannot name the type.
Pauses: TypeAlias = list[Pause]


class Pausing:
    """What ``Task`` can do to functions and queues. Each method has a twin for code on an event loop."""

    @staticmethod
    def pause_function_sync(name: str, *, by: str | None = None, reason: str | None = None) -> Pause:
        """Start no attempt of a function any more, on no worker, until it is resumed; what runs goes on.

        Within a second, whichever way a run came: its message, an instant of a schedule, a retry. Runs wait in the
        ledger and start in the order of priority and age when the function is resumed. Schedules go on opening them.

        Args:
            name: The function's registered name.
            by: Who wants it.
            reason: Why. Of a paused function both stay as they are.

        Raises:
            UnknownTaskFunctionError: No function has this name.
            InvalidOptionError: The function's ledger is off, or a text is too long.
        """
        if task_registry.options(name).ledger == "off":
            raise InvalidOptionError(
                "function", name, "a function whose runs are in the ledger",
                "It is registered with ledger='off': pause its queue.",
            )  # fmt: skip
        return _pause(PauseKind.FUNCTION, name, by, reason)

    @staticmethod
    def resume_function_sync(name: str) -> Pause | None:
        """Let a paused function's runs start again. Returns the pause that ends; None where there was none."""
        return _resume(PauseKind.FUNCTION, name)

    @staticmethod
    def pause_queue_sync(name: str, *, by: str | None = None, reason: str | None = None) -> Pause:
        """Let no worker consume a queue any more, until it is resumed; its messages stay in the broker.

        Workers stop within a second; those that start later do not begin. What a worker has fetched already runs.
        """
        check_text("queue", name, "the name of a queue, up to 200 characters")
        return _pause(PauseKind.QUEUE, name, by, reason)

    @staticmethod
    def resume_queue_sync(name: str) -> Pause | None:
        """Let the workers of a paused queue consume it again; as ``resume_function_sync``."""
        return _resume(PauseKind.QUEUE, name)

    @staticmethod
    def pauses_sync() -> Pauses:
        """The functions and queues that are paused, with who paused them, when and why."""
        at = station()
        with at.database.reading() as connection:
            return pauses.find(connection, at.name)

    @staticmethod
    async def pause_function(name: str, *, by: str | None = None, reason: str | None = None) -> Pause:
        """As ``pause_function_sync``, in a thread."""
        return await asyncio.to_thread(Pausing.pause_function_sync, name, by=by, reason=reason)

    @staticmethod
    async def resume_function(name: str) -> Pause | None:
        """As ``resume_function_sync``, in a thread."""
        return await asyncio.to_thread(Pausing.resume_function_sync, name)

    @staticmethod
    async def pause_queue(name: str, *, by: str | None = None, reason: str | None = None) -> Pause:
        """As ``pause_queue_sync``, in a thread."""
        return await asyncio.to_thread(Pausing.pause_queue_sync, name, by=by, reason=reason)

    @staticmethod
    async def resume_queue(name: str) -> Pause | None:
        """As ``resume_queue_sync``, in a thread."""
        return await asyncio.to_thread(Pausing.resume_queue_sync, name)

    @staticmethod
    async def pauses() -> Pauses:
        """As ``pauses_sync``, in a thread."""
        return await asyncio.to_thread(Pausing.pauses_sync)


def _pause(kind: PauseKind, name: str, by: str | None, reason: str | None) -> Pause:
    for option, value in (("by", by), ("reason", reason)):
        if value is not None:
            check_text(option, value, "a text of 1 to 200 characters")
    at = station()
    wanted = Pause(kind=kind, name=name, paused_at=at.database.now(), paused_by=by, reason=reason)
    with at.database.transaction() as tx:
        return pauses.put(tx, at.name, wanted)


def _resume(kind: PauseKind, name: str) -> Pause | None:
    check_text(str(kind), name, "a name of 1 to 200 characters")
    at = station()
    with at.database.transaction() as tx:
        return pauses.remove(tx, at.name, kind, name)
