"""AsyncioPool: thousands of coroutines in one worker process, under Celery's own, unmodified tracer.

The consumer stays in the main thread, so that signals, heartbeats, remote control and a broker that comes back do not
wait for coroutines. One thread runs the event loop: there each run of an ``async def`` function has its tracer in a
greenlet and its coroutine in an asyncio task. All other functions run in a bounded pool of threads.

Celery's callbacks (accepted, succeeded, failed) go back to the main thread: there kombu acknowledges, without locks.
"""

from __future__ import annotations

import contextvars
import gc
import inspect
import itertools
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.concurrency import base

from llmtasks.bridge import Tracer, loops
from llmtasks.holding import Cancelled, holdings
from llmtasks.run_task import RunTask
from llmtasks.worker import watchdog
from llmtasks.worker.callbacks import Callbacks

#: Sync functions that run at once at most; each has a thread.
THREADS: Final = 32
#: Threads for what a tracer would block the loop with.
BLOCKING: Final = 4
#: Seconds between two looks at timers and the end while the pool drains.
DRAIN_TICK: Final = 0.1
#: Seconds that coroutines get to tidy up when the worker is ended at once.
TIDY_UP: Final = 3.0

#: Its stubs describe an older Celery.
_BasePool: Any = base.BasePool


@dataclass(eq=False, slots=True, weakref_slot=True, kw_only=True)
class Job:
    """One message that the pool was given. Celery's request keeps it, to end it."""

    id: int
    pool: AsyncioPool
    run_id: str
    target: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    callbacks: dict[str, Callable[..., Any] | None]

    def trace(self) -> Any:
        """Run Celery's tracer."""
        return self.target(*self.args, **self.kwargs)

    def end(self, value: Any, error: BaseException | None) -> None:
        """The tracer has ended."""
        self.pool.end_on_loop(self, value, error)

    def terminate(self, _signal: int | None = None) -> None:
        """Cancel the coroutine, whose ``finally`` blocks run; nothing ends a thread."""
        holdings.interrupt(self.run_id, Cancelled("terminated"))


class AsyncioPool(_BasePool):  # type: ignore[misc]  # Any as a base, see above
    """Celery's pool of coroutines. ``worker_pool`` names it."""

    #: What people call it.
    name = "asyncio"
    body_can_be_buffer = True
    signal_safe = False
    limit: int
    app: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count(1)
        #: Of messages: given in the main thread, taken in the loop's.
        self._given: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._closing = False
        self._running = 0
        self._peak = 0
        self._main = Callbacks()
        self._is_async: dict[str, bool] = {}
        # Their threads begin with what is given to them.
        self._threads = ThreadPoolExecutor(min(self.limit, THREADS), "llmtasks-sync")
        self._blocking = ThreadPoolExecutor(BLOCKING, "llmtasks-blocking")

    # -- of the main thread

    def on_start(self) -> None:
        """Start the loop's thread."""
        # What was made until now stays for good: for the garbage collector to look at all of it again and again was a
        # fifth of what an empty run costs. Not later: a worker that says it is ready is to hear what it is asked.
        gc.collect()
        gc.freeze()
        self._loop = loops.shared()
        self._loop.call_soon_threadsafe(self._loop.set_default_executor, ThreadPoolExecutor(THREADS, "llmtasks-thread"))

    def register_with_event_loop(self, hub: Any) -> None:
        """Celery's event loop runs, for the first time or again."""
        self._main.go_on_with(hub)

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = None,
        kwargs: dict[str, Any] | None = None,
        correlation_id: str = "",
        **options: Any,
    ) -> Job:
        """Run a message's tracer as soon as there is room."""
        names = ("callback", "accept_callback", "error_callback")
        job = Job(
            id=next(self._numbers),
            pool=self,
            run_id=correlation_id,
            target=target,
            args=args,
            kwargs=kwargs or {},
            callbacks={name: options.get(name) for name in names},
        )
        self._jobs[job.id] = job
        if self._runs_async(args[0]):
            self._given.append(job)
            if len(self._given) == 1:
                self._loop.call_soon_threadsafe(self._take)
        else:
            # A context of its own: what one run sets, the thread's next does not see.
            self._threads.submit(contextvars.Context().run, self._run_in_thread, job)
        return job

    def _runs_async(self, name: str) -> bool:
        found = self._is_async.get(name)
        if found is None:
            task = self.app.tasks.get(name)
            found = isinstance(task, RunTask) and inspect.iscoroutinefunction(type(task).function)
            self._is_async[name] = found
        return found

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Do nothing: all jobs have one pid. Celery ends the job itself next, by ``Job.terminate``."""

    def grow(self, n: int = 1) -> None:
        """Let ``n`` more run at once."""
        self.limit += n
        self._loop.call_soon_threadsafe(self._start_waiting)

    def shrink(self, n: int = 1) -> None:
        """Let ``n`` fewer run at once; what runs goes on.

        Raises:
            ValueError: None would be left.
        """
        if self.limit - n < 1:
            raise ValueError(f"the pool has {self.limit} places, {n} fewer would leave none")
        self.limit -= n

    def on_stop(self) -> None:
        """Wait for what runs, and acknowledge it: nothing else runs in the main thread any more.

        What waits for a place goes back to the broker, when the consumer's connection is closed.
        """
        self._closing = True
        self._loop.call_soon_threadsafe(self._start_waiting)
        while self._jobs:
            self._main.call(DRAIN_TICK)
            self._main.run_timers()
        self._main.run_timers()
        self._close()

    def on_terminate(self) -> None:
        """End what runs, and give it a moment."""
        for job in list(self._jobs.values()):
            job.terminate()
        deadline = time.monotonic() + TIDY_UP
        while self._jobs and time.monotonic() < deadline:
            self._main.call(DRAIN_TICK)
        self._close()

    def _close(self) -> None:
        for executor in (self._threads, self._blocking):
            executor.shutdown(wait=False, cancel_futures=True)

    def _get_info(self) -> dict[str, Any]:
        return {
            **super()._get_info(),
            "running": self._running,
            "peak": self._peak,
            "waiting": len(self._waiting) + len(self._given),
            "threads": len(getattr(self._threads, "_threads", ())),
            **watchdog.report(self._loop),
        }

    # -- of the loop's thread

    def _take(self) -> None:
        while self._given:
            self._waiting.append(self._given.popleft())
        self._start_waiting()

    def _start_waiting(self) -> None:
        while self._waiting and (self._running < self.limit or self._closing):
            job = self._waiting.popleft()
            if self._closing:
                self._main.ask(self._forget, job)
                continue
            self._running += 1
            self._peak = max(self._peak, self._running)
            self._accept(job)
            Tracer(job, self._loop, self._blocking).proceed()

    def end_on_loop(self, job: Job, value: Any, error: BaseException | None) -> None:
        """A tracer has ended, in the loop's own greenlet."""
        self._running -= 1
        self._end(job, value, error)
        if self._waiting:
            self._start_waiting()

    def _run_in_thread(self, job: Job) -> None:
        if self._closing:
            self._main.ask(self._forget, job)
            return
        self._accept(job)
        try:
            value = job.trace()
        except BaseException as error:
            self._end(job, None, error)
        else:
            self._end(job, value, None)

    # -- of all threads

    def _accept(self, job: Job) -> None:
        self._main.ask(job.callbacks["accept_callback"], os.getpid(), time.monotonic())

    def _end(self, job: Job, value: Any, error: BaseException | None) -> None:
        if error is None:
            self._main.ask(job.callbacks["callback"], value)
        else:
            # What leaves the tracer itself, and not the function.
            self._main.ask(job.callbacks["error_callback"], _packed(error))
        self._main.ask(self._forget, job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)


def _packed(error: BaseException) -> ExceptionInfo:
    if not isinstance(error, Exception):
        error = WorkerLostError(repr(error))
    return ExceptionInfo((type(error), error, error.__traceback__))
