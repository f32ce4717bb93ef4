"""Around one attempt in a worker: claim, call, finish, tell. Each step is a function; ``run_attempt`` is the list of them.

What leaves ``run_attempt`` is what Celery's unmodified tracer must see: a value, an error, ``Retry``, or ``Ignore`` where there
is nothing to tell. The message is acknowledged after the end is in the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
import traceback as traceback_module
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any, Final, NoReturn, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery import states as celery_states
from celery.app.task import get_actual_ignore_result
from celery.exceptions import Ignore, Reject, Retry, TaskRevokedError
from celery.utils.serialization import get_pickleable_exception

from llmtasks import bridge, sender
from llmtasks.bridge import Body, NotYours
from llmtasks.dispatch import Station, relay, send, station
from llmtasks.errors import DatabaseUnavailableError, InvalidParamsError
from llmtasks.holding import Cancelled, Hold, holdings, in_pool_child, owner_of
from llmtasks.options import TaskOptions
from llmtasks.retry import backoff_delay
from llmtasks.states import ENDED, RunState
from llmtasks.store import claims, outbox, runs, schedules
from llmtasks.store.claims import Claim, Delivered, End, Offer

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds that an async on_failure or on_success may take.
CALLBACK_LIMIT: Final = 60.0
#: A callback is called once, and once more after a crash in the middle of it.
CALLBACK_CALLS: Final = 2
#: The longest wait between two tries to reach the ledger.
LEDGER_PAUSE: Final = 1.0
REDACTED: Final = "***"


class _Current(threading.local):
    """The attempt of this thread."""

    hold: Hold | None = None
    body: Body | None = None
    inside: bool = False


current: Final = _Current()


def run_attempt(task: Any, options: TaskOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one attempt of the current run, tell its end again, or leave it to whoever holds it.

    Raises:
        Ignore: There is nothing to tell: the run is not ours, waits for a slot, or its end was told here.
        Retry: The attempt failed; the ledger keeps the time of the next one.
        Exception: The run failed for good.
    """
    request = task.request
    request._protected = 1  # trace.py:882: a nested call of the same task pushes a request of its own
    name_links(request)
    current.inside = True
    try:
        hold = claim_run(task, options)
        request.llm_hold = hold
        request.retries = hold.claim.attempts  # the ledger counts, not the message
        if hold.claim.state in ENDED:
            return replay(task, hold)
        return conclude(task, options, hold, args, kwargs)
    finally:
        current.inside = False


def hold_of(request: Any) -> Hold | None:
    """What the current process holds for a request; None outside an attempt of ours."""
    return getattr(request, "llm_hold", None)


def name_links(request: Any) -> None:
    """Give links and errbacks fixed ids, so that the claim drops the copies that a replay sends."""
    for kind in ("callbacks", "errbacks"):
        for index, link in enumerate(getattr(request, kind, None) or ()):
            if not link.get("subtask_type"):
                link["options"].setdefault("task_id", str(uuid.uuid5(_as_uuid(request.id), f"{kind}{index}")))


# -- claim


def claim_run(task: Any, options: TaskOptions) -> Hold:
    """Take the run and its slots in one transaction.

    Raises:
        Ignore: It is not ours to run now; the message is done with.
    """
    request, at = task.request, station(task.app)
    where = request.delivery_info or {}
    offer = Offer(
        id=request.id,
        app=at.name,
        func_name=task.name,
        args=sender.dumps(request.args, "args"),
        kwargs=sender.dumps(request.kwargs, "kwargs"),
        envelope=sender.envelope_of_request(request, get_actual_ignore_result(task, request)),
        queue=where.get("routing_key"),
        priority=sender.user_priority(task.app, where.get("priority")),
        attempts=request.retries or 0,
        max_retries=task.max_retries,
        retry_delay=task.default_retry_delay,
        function_slots=options.max_instances,
        owner=owner_of(),
        worker=request.hostname or "",
    )

    def take() -> tuple[Claim | None, str | None]:
        now = at.database.now()
        with at.database.transaction() as tx:
            found = claims.claim(tx, offer, now, now - at.settings.lease_time)
            if found is None or found.state in ENDED:
                return found, None
            full = claims.take_slots(tx, at.name, task.name, found, now)
            if full is not None:
                state = RunState.SKIPPED if _may_skip(tx, found) else RunState.WAITING
                claims.put_aside(tx, found, state, full, now)
            return found, full

    claim, full = persist(at, take)
    if claim is None:
        raise Ignore("the run has ended, is held elsewhere, or was superseded")
    if full is not None:
        logger.info("run %s does not start: %s", claim.id, full)
        raise Ignore(full)
    body = Body(soft_limit=soft_limit_of(task))
    hold = Hold(station=at, claim=claim, body=body, args=offer.args, kwargs=offer.kwargs)
    holdings.hold(hold)
    return hold


def soft_limit_of(task: Any) -> float | None:
    """Seconds after which the function is told that its time is up: the message's limit, else the task's."""
    limit = task.request.timelimit
    soft = limit[1] if limit and limit[1] else task.soft_time_limit
    return float(soft) if soft else None


def _may_skip(tx: Any, claim: Claim) -> bool:
    """Only the first attempt of a periodic instant: the next one comes anyway. What stands for missed instants waits."""
    if claim.schedule_id is None or claim.scheduled_for is None or claim.attempts or claim.reason:
        return False
    schedule = schedules.get(tx, claim.schedule_id)
    return schedule is not None and schedule.kind != "once"


# -- call


def conclude(task: Any, options: TaskOptions, hold: Hold, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function and record how the attempt ended."""
    request = task.request
    try:
        value = call(task, hold, args, kwargs)
        if getattr(request, "llm_retry", None) is not None:  # self.retry(throw=False)
            raise request.llm_retry
    except Retry as error:
        again(task, hold, error)
    except Reject as error:
        state = RunState.QUEUED if error.requeue else RunState.FAILED
        # Celery's main process stores FAILURE for a message that is rejected for good (request.py:683).
        finish(hold, End(state=state, counts=not error.requeue, delivered=not error.requeue, error=_line(error)))
        raise
    except Ignore:
        if not getattr(request, "llm_replaced", False):
            finish(hold, End(state=RunState.SKIPPED, delivered=True, reason="the function raised Ignore"))
        raise
    except NotYours as error:
        holdings.release(hold)
        raise Ignore("another worker holds the run") from error
    except Cancelled as error:
        finish(hold, End(state=RunState.CANCELLED, keeps_owner=True, reason=str(error)))
        return tell_cancelled(task, hold, str(error))
    except asyncio.CancelledError as error:
        # Cancelled by something inside the function: for Celery's tracer that must be an ordinary failure.
        failed(task, options, hold, RuntimeError("the function's coroutine was cancelled from within"), error)
    except Exception as error:
        failed(task, options, hold, error, error)
    else:
        return succeeded(task, hold, value)
    raise AssertionError("unreachable: every branch above raises or returns")


def call(task: Any, hold: Hold, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function; only in here may a soft limit or a cancellation interrupt."""
    install_soft_limit()
    current.hold = hold
    holdings.set_calling(hold, True)
    hold.body.started = time.monotonic()
    current.body = hold.body
    try:
        return task.run(*args, **kwargs)
    finally:
        current.body = None
        holdings.set_calling(hold, False)
        current.hold = None


def call_body(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``task.run`` does: the function itself, in the attempt of this thread if there is one."""
    return bridge.call(function, args, kwargs, current.body or Body())


_soft_signal_installed = False


def install_soft_limit() -> None:
    """Let prefork's soft limit reach the function, and nothing else.

    billiard's own handler raises wherever the main thread happens to be: in our SQL, in the tracer, in asyncio.
    """
    global _soft_signal_installed
    if _soft_signal_installed or not in_pool_child() or threading.current_thread() is not threading.main_thread():
        return
    _soft_signal_installed = True
    signal.signal(signal.SIGUSR1, _on_soft_limit)


def _on_soft_limit(_signum: int, _frame: FrameType | None) -> None:
    body = current.body
    if body is None:
        if current.inside:
            return  # claiming or finishing: the function is not running
        raise SoftTimeLimitExceeded  # a task that is not ours
    if body.soft_limit is not None and time.monotonic() - body.started < body.soft_limit * 0.9:
        return  # meant for the run before this one
    if not body.is_async:
        raise SoftTimeLimitExceeded(body.soft_limit)
    if body.is_current() and not body.exceeded:
        body.exceeded = True  # its own code blocks the loop: nothing but this can interrupt it
        raise SoftTimeLimitExceeded(body.soft_limit)
    body.exceed()


# -- finish


def succeeded(task: Any, hold: Hold, value: Any) -> Any:
    """Record the result. One that JSON cannot carry fails for good: running again would not help."""
    try:
        result = sender.dumps(value, "result")
    except InvalidParamsError as error:
        _fail_for_good(task, hold, error, error)
    finish(hold, End(state=RunState.SUCCEEDED, keeps_owner=True, result=result))
    return value


def failed(task: Any, options: TaskOptions, hold: Hold, error: Exception, cause: BaseException) -> NoReturn:
    """Record a failed attempt: the time of the next one if there is one, else the run's end."""
    claim = hold.claim
    final = (
        getattr(task.request, "llm_final", False)
        or isinstance(error, (*task.throws, *_tuple(options.celery.get("dont_autoretry_for"))))
        or (claim.max_retries is not None and claim.attempts >= claim.max_retries)
    )
    if final:
        _fail_for_good(task, hold, error, cause)
    delay = claim.retry_delay
    if options.retry_backoff:
        delay = backoff_delay(claim.attempts + 1, base=max(1.0, claim.retry_delay))
    retry = Retry(exc=error, when=delay)
    _finish_retrying(hold, retry, delay, trace=_trace(cause))
    raise retry from cause


def again(task: Any, hold: Hold, retry: Retry) -> NoReturn:
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


def _finish_retrying(hold: Hold, retry: Retry, delay: float, *, trace: str | None, **changes: Any) -> None:
    error = retry.exc
    finish(
        hold,
        End(
            state=RunState.RETRYING,
            reason=f"attempt {hold.claim.attempts + 1} ended: {_line(error) if error else 'retry was asked for'}",
            error=_line(error) if isinstance(error, BaseException) else None,
            traceback=trace,
            next_attempt_at=hold.station.database.now() + timedelta(seconds=max(0.0, delay)),
            **changes,
        ),
    )


def _fail_for_good(task: Any, hold: Hold, error: Exception, cause: BaseException) -> NoReturn:
    packed = sender.backend_exception(task.app, get_pickleable_exception(error))  # as the tracer does (trace.py:222)
    finish(
        hold,
        End(
            state=RunState.FAILED, keeps_owner=True, reason=_line(error), error=_line(error), failure=packed, traceback=_trace(cause)
        ),
    )  # fmt: skip
    raise error


def finish(hold: Hold, how: End) -> None:
    """Write how the attempt ended, under its claim; slots go to whoever waits.

    Raises:
        Ignore: The run is no longer ours; whatever happened here counts for nothing.
    """
    at = hold.station
    how = _measured(hold, how)

    def write() -> tuple[bool, list[str]]:
        with at.database.transaction() as tx:
            return claims.end(tx, hold.claim, how, at.database.now())

    ours, handed = (False, []) if hold.lost else persist(at, write)
    if not ours or not how.keeps_owner:
        holdings.release(hold)
    if not ours:
        raise Ignore("the run is no longer ours")
    if handed:
        relay(at, handed)


def _measured(hold: Hold, how: End) -> End:
    return replace(
        how,
        run_seconds=time.monotonic() - hold.body.started,
        cpu_seconds=hold.cpu_seconds,
        peak_memory=hold.peak_memory,
    )


def persist(at: Station, write: Callable[[], T]) -> T:
    """Do a write that must not be given up: an outage of the database delays it, and is said once."""
    pause, said = 0.05, False
    while True:
        try:
            found = write()
        except DatabaseUnavailableError as error:
            if not said:
                logger.warning("waiting for the ledger: %s", error)
            said = True
            time.sleep(pause)
            pause = min(LEDGER_PAUSE, pause * 2)
        else:
            return found


# -- tell


def replay(task: Any, hold: Hold) -> Any:
    """Tell Celery how a run ended that ended before; the function is not called."""
    claim = hold.claim
    if claim.state is RunState.SUCCEEDED:
        return sender.loads(claim.result or "null")
    if claim.state is RunState.FAILED:
        error = task.backend.exception_to_python(sender.loads(claim.failure or "null"))
        if not isinstance(error, Exception):  # a SystemExit raised here would end the next child too
            error = WorkerLostError(repr(error))
        raise error
    return tell_cancelled(task, hold, claim.reason or str(claim.state))


def tell_cancelled(task: Any, hold: Hold, reason: str) -> NoReturn:
    """Store REVOKED and tell chord, chain and errbacks (``mark_as_revoked`` would tell the chord only, base.py:439)."""
    request = task.request
    task.backend.mark_as_failure(
        request.id,
        TaskRevokedError(reason),
        request=request,
        state=celery_states.REVOKED,
        store_result=not get_actual_ignore_result(task, request),
    )
    holdings.deliver(hold, delivered(task, hold, task.options.redact))
    raise Ignore(reason)


def after_return(task: Any, options: TaskOptions, status: str, value: Any) -> None:
    """Result, links and chord are stored: call the callbacks and set ``delivered``."""
    hold = hold_of(task.request)
    if hold is None:
        return
    callback = {celery_states.SUCCESS: options.on_success, celery_states.FAILURE: options.on_failure}.get(status)
    if callback is not None and hold.claim.callback_calls < CALLBACK_CALLS:
        call_back(callback, hold, value)
    holdings.deliver(hold, delivered(task, hold, options.redact))


def call_back(callback: Callable[..., Any], hold: Hold, value: Any) -> None:
    """Call on_failure or on_success with the run; an error in it is logged and recorded, and changes nothing else."""
    at, claim = hold.station, hold.claim

    def read() -> runs.Run | None:
        with at.database.transaction() as tx:
            claims.count_callback(tx, claim.id, claim.claim_no)
            return runs.get(tx, claim.id)

    run = persist(at, read)
    try:
        bridge.call(callback, (run, value), {}, Body(soft_limit=CALLBACK_LIMIT))
    except (Exception, asyncio.CancelledError) as error:
        name = bridge.name_of(callback)
        logger.exception("callback %s of run %s failed", name, claim.id)
        note = f"{run.reason + '; ' if run and run.reason else ''}callback {name} raised {_line(error)}"

        def write() -> None:
            with at.database.transaction() as tx:
                claims.remark(tx, claim.id, claim.claim_no, note)

        persist(at, write)


def let_go(task: Any) -> None:
    """The tracer lets go of the request. What is still held could not be told: the keeper has it told again.

    Celery would now store FAILURE and call errbacks for a function that succeeded (trace.py:689), so the request is disarmed.
    """
    hold = hold_of(task.request)
    if hold is None or not holdings.release(hold):
        return
    task.request.update(chord=None, chain=None, errbacks=None, ignore_result=True)

    def write() -> None:
        with hold.station.database.transaction() as tx:
            claims.let_go(tx, hold.claim.id, hold.claim.claim_no)

    persist(hold.station, write)


def delivered(task: Any, hold: Hold, redact: tuple[str, ...]) -> Delivered:
    """What the ledger keeps of a run that is over: long texts are cut, secret parameters hidden."""
    hidden_args = hidden_kwargs = None
    if redact:
        names = [*task.parameters, *("" for _ in task.request.args or ())]
        pairs = zip(names, sender.loads(hold.args), strict=False)
        hidden_args = sender.dumps([REDACTED if name in redact else value for name, value in pairs], "args")
        items = sender.loads(hold.kwargs).items()
        hidden_kwargs = sender.dumps({name: REDACTED if name in redact else value for name, value in items}, "kwargs")
    return Delivered(
        run_id=hold.claim.id,
        claim=hold.claim.claim_no,
        hidden_args=hidden_args,
        hidden_kwargs=hidden_kwargs,
        keep=hold.station.settings.keep_bytes,
    )


def replaced(task: Any, hold: Hold, replacement: Any) -> NoReturn:
    """Give the run to another function: written first, published after, so that no crash loses it."""
    at = hold.station
    finish(hold, End(state=RunState.QUEUED, counts=False, replacement=sender.dumps(replacement, "the replacement")))
    task.request.llm_replaced = True

    def owe() -> list[outbox.Message]:
        now = at.database.now()
        with at.database.transaction() as tx:
            return outbox.requeue(tx, at.name, hold.claim.id, now, now + timedelta(seconds=at.settings.outbox_patience))

    send(at, persist(at, owe))
    raise Ignore("replaced by another task")


def _line(error: BaseException | None) -> str:
    return "" if error is None else traceback_module.format_exception_only(error)[-1].strip()[:500]


def _trace(error: BaseException) -> str:
    return "".join(traceback_module.format_exception(error))


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else tuple(value) if isinstance(value, list) else (value,) if value else ()


def _as_uuid(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        return uuid.uuid5(uuid.NAMESPACE_OID, text)
