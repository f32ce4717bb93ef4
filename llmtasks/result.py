"""RunResult: Celery's handle of a result, which an event loop can wait for."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from celery.exceptions import TimeoutError
from celery.result import AsyncResult

from llmtasks import bridge

R_co = TypeVar("R_co", covariant=True)

#: Seconds between two looks for a result: the first, and the longest.
FIRST_LOOK: Final = 0.01
LAST_LOOK: Final = 0.5

if TYPE_CHECKING:

    class _Result(AsyncResult[R_co], Generic[R_co]):
        """Celery's, which has no parameter at run time."""
else:

    class _Result(AsyncResult, Generic[R_co]):
        """Celery's."""


class RunResult(_Result[R_co]):
    """The result of a run of a registered function, now or later."""

    def get(self, *args: Any, **kwargs: Any) -> R_co:
        """Wait for the result, as Celery's own does.

        Raises:
            RuntimeError: Called in a coroutine of a worker: the loop that it stands on would wait for itself.
        """
        if bridge.in_coroutine():
            raise RuntimeError(
                f"result.get() of run {self.id} inside a coroutine would stop all coroutines of this worker: "
                "write `await result.aget()`, or a chain or chord if another run is to go on with it"
            )
        found: R_co = super().get(*args, **kwargs)
        return found

    async def aget(self, timeout: float | None = None, *, propagate: bool = True) -> R_co:  # noqa: ASYNC109
        """Wait for the result on an event loop, which goes on meanwhile.

        It is asked for again and again, at longer and longer intervals up to half a second.

        Args:
            timeout: Seconds to wait at most.
            propagate: Raise the run's error; otherwise return it.

        Raises:
            celery.exceptions.TimeoutError: It is not there in time.
            Exception: The run failed.
        """
        ends, pause = None if timeout is None else time.monotonic() + timeout, FIRST_LOOK
        while not (self.ignored or await asyncio.to_thread(self.ready)):
            left = pause if ends is None else ends - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"run {self.id} has no result after {timeout} s")
            await asyncio.sleep(min(pause, left))
            pause = min(LAST_LOOK, pause * 1.5)
        # It is here; a parent's error may have to be looked for.
        found: R_co = await asyncio.to_thread(super().get, propagate=propagate, disable_sync_subtasks=False)
        return found
