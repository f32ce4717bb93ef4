"""Tell: results, links, chord and callbacks learn the end; what could not be told is left to a keeper."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any, Final, NoReturn

from billiard.exceptions import WorkerLostError
from celery import states as celery_states
from celery.exceptions import Ignore, TaskRevokedError
from kombu.exceptions import EncodeError

from llmtasks import bridge, sender
from llmtasks.attempt.finishing import line_of
from llmtasks.bridge import Body
from llmtasks.errors import LLMTasksError
from llmtasks.holding import Hold, hold_of, holdings, persist
from llmtasks.options import TaskOptions
from llmtasks.states import ENDED, RunState
from llmtasks.store import held, runs
from llmtasks.store.held import Delivered

logger = logging.getLogger(__name__)

#: Seconds that an async on_failure or on_success may take.
CALLBACK_LIMIT: Final = 60.0
#: A callback is called once, and once more after a crash in the middle of it.
CALLBACK_CALLS: Final = 2
REDACTED: Final = "***"
#: What Celery's tracer says when it stored an end.
TOLD: Final = {RunState.SUCCEEDED: celery_states.SUCCESS, RunState.FAILED: celery_states.FAILURE}


def say_started(task: Any) -> None:
    """Store STARTED where ``track_started`` asks for it; the tracer itself would fail the run if it could not."""
    if not task.says_started:
        return
    request = task.request
    if sender.ignores_result(task, request):
        return
    try:
        about = {"pid": os.getpid(), "hostname": request.hostname}
        task.backend.store_result(request.id, about, celery_states.STARTED, request=request)
    except Exception as error:
        logger.warning("run %s: that it started cannot be stored: %r", request.id, error)


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
    try:
        task.backend.mark_as_failure(
            request.id,
            TaskRevokedError(reason),
            request=request,
            state=celery_states.REVOKED,
            store_result=not sender.ignores_result(task, request),
        )
        if _is_chord_sent(task, hold):
            holdings.deliver(hold, delivered(task, hold, task.options.redact))
        else:
            let_go(task)
    except Exception as error:  # to the tracer it would be the function's own failure
        logger.warning("run %s: nobody could be told that it is cancelled, a keeper tries again: %r", request.id, error)
        let_go(task)
    raise Ignore(reason)


def after_return(task: Any, options: TaskOptions, status: str, value: Any) -> None:
    """Result, links and chord are stored: call the callbacks and set ``delivered``."""
    hold = hold_of(task.request)
    if hold is None or not _was_told(hold, status, value) or not _is_chord_sent(task, hold):
        return
    callback = {celery_states.SUCCESS: options.on_success, celery_states.FAILURE: options.on_failure}.get(status)
    if callback is not None and hold.claim.callback_calls < CALLBACK_CALLS:
        call_back(callback, hold, value)
    holdings.deliver(hold, delivered(task, hold, options.redact))
    if callback is not None:
        try:
            bridge.in_thread(
                holdings.flush
            )  # at once: should this process die before, the callback would be called again
        except LLMTasksError as error:
            logger.warning("run %s: that it was told is written down later: %s", hold.claim.id, error)


def _was_told(hold: Hold, status: str, value: Any) -> bool:
    """Whether Celery stored the end that the ledger has; else something of it failed, and a keeper has it told."""
    if isinstance(value, EncodeError):
        return True  # the backend cannot carry the result, which will not change
    return TOLD.get(hold.ended or hold.claim.state) == status


def _is_chord_sent(task: Any, hold: Hold) -> bool:
    """Whether the chord of a replayed member needs no more from it; else a keeper has it told again.

    The Redis backend lets one process send the body, and the others pass for as long as that one's claim lives
    (backends/redis.py:104-142). It may be the claim of the process that died here before.
    """
    if hold.claim.state not in ENDED:
        return True
    request = task.request
    if not request.chord or not request.group:
        return True
    if bridge.tracer_here() is not None:
        return bridge.in_thread(lambda: _is_chord_sent(task, hold))
    from celery.backends.redis import RedisBackend  # not every app has results there

    backend = task.backend
    if not isinstance(backend, RedisBackend):
        return True
    client: Any = backend.client
    try:
        claim = client.get(backend.get_key_for_group(request.group, ".c"))
    except Exception as error:  # to the tracer it would be the function's own failure
        logger.warning("run %s: whether its chord is sent cannot be seen: %r", request.id, error)
        return False
    return claim in {None, b"done", "done"}


def call_back(callback: Callable[..., Any], hold: Hold, value: Any) -> None:
    """Call on_failure or on_success with the run; an error in it is logged and recorded, and changes nothing else."""
    at, claim = hold.station, hold.claim

    def read() -> runs.Run | None:
        with at.database.transaction() as tx:
            held.count_callback(tx, claim.id, claim.claim_no)
            return runs.get(tx, claim.id)

    run = persist(read)
    is_async = inspect.iscoroutinefunction(callback)
    body = Body(soft_limit=CALLBACK_LIMIT)
    try:
        if is_async:
            bridge.call(callback, (run, value), {}, body)
        else:
            bridge.in_thread(lambda: bridge.call(callback, (run, value), {}, body))
    except (Exception, asyncio.CancelledError) as error:
        name = bridge.name_of(callback)
        logger.exception("callback %s of run %s failed", name, claim.id)
        note = f"{run.reason + '; ' if run and run.reason else ''}callback {name} raised {line_of(error)}"

        def write() -> None:
            with at.database.transaction() as tx:
                held.remark(tx, claim.id, claim.claim_no, note)

        persist(write)


def let_go(task: Any) -> None:
    """The tracer lets go of the request. What is still held could not be told: the keeper has it told again.

    Celery would now store FAILURE and call errbacks for a function that succeeded (trace.py:689): the request is
    disarmed.
    """
    hold = hold_of(task.request)
    if hold is None:
        return
    # Also where nothing is held any more: the run may wait for its next attempt, which mark_as_retry failed to say.
    task.request.update(chord=None, chain=None, errbacks=None, ignore_result=True)
    if not holdings.release(hold):
        return

    def write() -> None:
        with hold.station.database.transaction() as tx:
            held.let_go(tx, hold.claim.id, hold.claim.claim_no)

    persist(write)


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
