"""Zombies: coroutines that go on although they were told to stop. They are told again, counted, and named once each.

Everything here but the counting happens in the thread of the coroutine's loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import traceback
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

logger = logging.getLogger(__name__)

#: The longest pause between two times that a coroutine is told.
LONGEST_PATIENCE: Final = 30.0


@dataclass(eq=False, slots=True)
class _Told:
    """A task that was told to stop and has not ended."""

    loop: asyncio.AbstractEventLoop
    task: asyncio.Task[Any]
    coroutine: Coroutine[Any, Any, Any]
    name: str
    patience: float
    since: float = field(default_factory=time.monotonic)
    is_zombie: bool = False
    named: bool = False
    timer: asyncio.TimerHandle | None = None


class Zombies:
    """The tasks of this process that were told to stop and still run.

    Args:
        patience: Seconds that a coroutine gets to tidy up before it is told again; each time it gets twice as many.
    """

    def __init__(self, patience: float = 3.0) -> None:
        self.patience = patience
        self._told: dict[asyncio.Task[Any], _Told] = {}
        os.register_at_fork(after_in_child=self._told.clear)

    def __len__(self) -> int:
        """How many go on: after they had time to tidy up, or after their run was over without them."""
        return sum(told.is_zombie for told in list(self._told.values()))

    def cancel(
        self,
        loop: asyncio.AbstractEventLoop,
        task: asyncio.Task[Any],
        coroutine: Coroutine[Any, Any, Any],
        name: str,
        *,
        is_stray: bool = False,
    ) -> None:
        """Cancel a task, and again with growing pauses until it ends.

        Args:
            loop: The loop of the task, in whose thread this is called.
            task: The task.
            coroutine: What the task runs, to show where it waits.
            name: Names it in the log.
            is_stray: Nobody waits for it any more: it is a zombie from now on.
        """
        if task.done():
            return
        told = self._told.get(task)
        if told is None:
            told = self._told[task] = _Told(loop, task, coroutine, name, self.patience)
            told.timer = loop.call_later(told.patience, self._again, told)
            task.add_done_callback(self._forget)
        told.is_zombie = told.is_zombie or is_stray
        task.cancel()

    def _again(self, told: _Told) -> None:
        told.is_zombie = True
        if not told.named:
            told.named = True
            logger.warning(
                "%s was told to stop %.0f s ago and still runs; it is told again until it ends. Code that catches "
                "asyncio.CancelledError (or BaseException) must raise it again. It waits here:\n%s",
                told.name,
                time.monotonic() - told.since,
                where(told.coroutine),
            )
        told.task.cancel()
        told.patience = min(LONGEST_PATIENCE, told.patience * 2)
        told.timer = told.loop.call_later(told.patience, self._again, told)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        told = self._told.pop(task)
        if told.timer is not None:
            told.timer.cancel()
        if told.named:
            logger.info("%s has ended, %.1f s after it was told to stop", told.name, time.monotonic() - told.since)


def where(coroutine: Any) -> str:
    """The frames in which a coroutine that waits is suspended, outermost first, as in a traceback."""
    frames: list[tuple[FrameType, int]] = []
    while coroutine is not None:
        for kind in ("cr", "gi", "ag"):  # coroutines, generators, async generators
            frame = getattr(coroutine, f"{kind}_frame", None)
            if frame is not None:
                frames.append((frame, frame.f_lineno))
                coroutine = getattr(coroutine, {"gi": "gi_yieldfrom"}.get(kind, f"{kind}_await"))
                break
        else:
            break
    return "".join(traceback.StackSummary.extract(iter(frames)).format()) or "  (nowhere: it has not begun)\n"


zombies: Final = Zombies()
