"""Finish: how the attempt ended, under its claim; the decision between another attempt and the end."""

from __future__ import annotations

import time
import traceback as traceback_module
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Final, NoReturn, cast

from celery.exceptions import Ignore, Retry
from celery.utils.serialization import get_pickleable_exception

from llmtasks import bridge, sender
from llmtasks.attempt.writer import Writer
from llmtasks.dispatch import relay
from llmtasks.errors import InvalidParamsError
from llmtasks.holding import Hold, holdings, persist
from llmtasks.options import TaskOptions
from llmtasks.retry import backoff_delay
from llmtasks.states import RunState
from llmtasks.store import ends
from llmtasks.store.ends import End

#: Celery's default for ``retry_backoff_max``, seconds.
BACKOFF_MAX: Final = 600.0


def finish(hold: Hold, how: End) -> None:
    """Write how the attempt ended, under its claim; slots go to whoever waits.

    Raises:
        Ignore: The run is no longer ours; whatever happened here counts for nothing.
    """
    at = hold.station
    how = _measured(hold, how)

    def write() -> tuple[bool, list[str]]:
        if is_lone:
            with at.database.lone() as lone:
                return ends.end_lone(lone, hold.claim, how, at.database.now()), []
        with at.database.transaction() as tx:
            return ends.end(tx, hold.claim, how, at.database.now())

    tracer, is_lone = bridge.tracer_here(), ends.is_lone(hold.claim, how)
    handed: list[str] = []
    if hold.lost:
        ours = False
    elif tracer is not None and is_lone:
        ours = tracer.wait_for(Writer.at(at).end(hold.claim, how))
    else:
        ours, handed = persist(write)
    if not ours or not how.keeps_owner:
        holdings.release(hold)
    if not ours:
        raise Ignore("the run is no longer ours")
    hold.ended = how.state
    if handed:
        bridge.in_thread(lambda: relay(at, handed))


def succeeded(task: Any, hold: Hold, value: Any) -> Any:
    """Record the result. One that JSON cannot carry fails for good: running again would not help."""
    try:
        result = sender.dumps(value, "result")
    except InvalidParamsError as error:
        fail_for_good(task, hold, error, error)
    finish(hold, End(state=RunState.SUCCEEDED, keeps_owner=True, result=result))
    return value


def failed(task: Any, options: TaskOptions, hold: Hold, error: Exception, cause: BaseException) -> NoReturn:
    """Record a failed attempt: the time of the next one if there is one, else the run's end."""
    claim = hold.claim
    cause.__traceback__ = _of_the_function(cause.__traceback__)
    if is_final(task, options, error, claim.attempts, claim.max_retries):
        fail_for_good(task, hold, error, cause)
    delay = delay_before(options, claim.attempts, claim.retry_delay)
    # The stub wants numbers.Real, which no float is to a type checker.
    retry: Any = Retry(exc=error, when=cast("Any", delay))
    _finish_retrying(hold, retry, delay, trace=_trace(cause))
    raise retry from cause


def is_final(task: Any, options: TaskOptions, error: Exception, attempts: int, max_retries: int | None) -> bool:
    """Whether a failed attempt is the last, after so many ``attempts`` before it."""
    return (
        getattr(task.request, "llm_final", False)
        or isinstance(error, (*_tuple(task.throws), *_tuple(options.celery.get("dont_autoretry_for"))))
        or (max_retries is not None and attempts >= max_retries)
    )


def delay_before(options: TaskOptions, attempts: int, retry_delay: float) -> float:
    """Seconds between a failed attempt, after so many ``attempts`` before it, and the next one."""
    if not options.retry_backoff:
        return retry_delay
    # As Celery's own: from 1 s on, at most retry_backoff_max.
    return backoff_delay(attempts + 1, cap=float(options.celery.get("retry_backoff_max", BACKOFF_MAX)))


def again(task: Any, hold: Hold, retry: Any) -> NoReturn:
    """Record what ``self.retry()`` asked for, with its changed arguments and options, and let Celery see the Retry."""
    when = retry.when
    if isinstance(when, datetime):
        when = (when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)
    delay = when.total_seconds() if isinstance(when, timedelta) else float(when or 0)
    changes: dict[str, Any] = {}
    if retry.sig is not None:
        changes = {"args": sender.dumps(retry.sig.args, "args"), "kwargs": sender.dumps(retry.sig.kwargs, "kwargs")}
    _finish_retrying(hold, retry, delay, trace=None, **changes)
    raise retry


def replaced(task: Any, hold: Hold, replacement: Any) -> NoReturn:
    """Give the run to another function: with its message in the outbox first, sent after, so that no crash loses it."""
    finish(hold, End(state=RunState.PENDING, counts=False, replacement=sender.dumps(replacement, "the replacement")))
    task.request.llm_replaced = True
    bridge.in_thread(lambda: relay(hold.station, [hold.claim.id]))
    raise Ignore("replaced by another task")


def _finish_retrying(hold: Hold, retry: Any, delay: float, *, trace: str | None, **changes: Any) -> None:
    error = retry.exc
    finish(
        hold,
        End(
            state=RunState.RETRYING,
            reason=f"attempt {hold.claim.attempts + 1} ended: {line_of(error) if error else 'retry was asked for'}",
            error=line_of(error) if isinstance(error, BaseException) else None,
            traceback=trace,
            next_attempt_at=bridge.in_thread(hold.station.database.now) + timedelta(seconds=max(0.0, delay)),
            **changes,
        ),
    )


def fail_for_good(task: Any, hold: Hold, error: Exception, cause: BaseException) -> NoReturn:
    """Record the run's end: it failed, and another attempt is not wanted."""
    packed = sender.backend_exception(task.app, get_pickleable_exception(error))  # as the tracer does (trace.py:222)
    finish(
        hold,
        End(
            state=RunState.FAILED,
            keeps_owner=True,
            reason=line_of(error),
            error=line_of(error),
            failure=packed,
            traceback=_trace(cause),
        ),
    )
    raise error


def _measured(hold: Hold, how: End) -> End:
    return how._replace(
        run_seconds=time.monotonic() - hold.body.started,
        cpu_seconds=hold.cpu_seconds,
        peak_memory=hold.peak_memory,
    )


def line_of(error: BaseException | None) -> str:
    """An error in one line: its type and message."""
    return "" if error is None else traceback_module.format_exception_only(error)[-1].strip()[:500]


def _of_the_function(trace: TracebackType | None) -> TracebackType | None:
    """A traceback that begins with the function: what called it says nothing, and is long."""
    own = trace
    while own is not None and own.tb_frame.f_globals.get("__name__", "").startswith(("llmtasks.", "celery.")):
        own = own.tb_next
    return own or trace


def _trace(error: BaseException) -> str:
    return "".join(traceback_module.format_exception(error))


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else tuple(value) if isinstance(value, list) else (value,) if value else ()
