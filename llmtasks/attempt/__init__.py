"""Around one attempt in a worker: claim, call, finish, tell; ``run_attempt`` is the list of these steps.

What leaves it is what Celery's unmodified tracer must see: a value, an error, ``Retry``, or ``Ignore`` where there is
nothing to tell. The message is acknowledged after the end is in the ledger.
"""

from __future__ import annotations

import asyncio
from typing import Any

from celery.exceptions import Ignore, Reject, Retry

from llmtasks.attempt.calling import as_failure, call, call_body, current, hold_here, install_soft_limit
from llmtasks.attempt.claiming import claim_run, name_links
from llmtasks.attempt.finishing import again, fail_for_good, failed, finish, line_of, replaced, succeeded
from llmtasks.attempt.off_ledger import run_off_ledger
from llmtasks.attempt.telling import after_return, let_go, replay, say_started, tell_cancelled
from llmtasks.bridge import NotYours
from llmtasks.holding import Cancelled, Hold, hold_of, holdings
from llmtasks.options import TaskOptions
from llmtasks.states import ENDED, RunState
from llmtasks.store.ends import End

__all__ = [
    "after_return",
    "call_body",
    "current",
    "hold_of",
    "is_telling",
    "let_go",
    "replaced",
    "run_attempt",
    "run_off_ledger",
]


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
    install_soft_limit()
    try:
        hold = claim_run(task, options)
        request.llm_hold = hold
        request.retries = hold.claim.attempts  # the ledger counts, not the message
        if hold.claim.state in ENDED:
            hold.ended = hold.claim.state
            return replay(task, hold)
        say_started(task)
        return conclude(task, options, hold, args, kwargs)
    finally:
        current.inside = False


def is_telling() -> bool:
    """Whether Celery's tracer is telling the end of this thread's run now: the function is not running any more."""
    hold = hold_here()
    return hold is not None and hold.ended is not None


def conclude(task: Any, options: TaskOptions, hold: Hold, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function and record how the attempt ended, whatever goes wrong in between."""
    try:
        return _conclude(task, options, hold, args, kwargs)
    except (Ignore, Reject, Retry):
        raise
    except Exception as error:
        if hold.ended is None and not hold.lost:  # the end itself could not be written: new arguments are not JSON
            fail_for_good(task, hold, error, error)
        raise


def _conclude(task: Any, options: TaskOptions, hold: Hold, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    request = task.request
    try:
        value = call(task, hold, args, kwargs)
        if getattr(request, "llm_retry", None) is not None:  # self.retry(throw=False)
            raise request.llm_retry
    except Retry as error:
        again(task, hold, error)
    except Reject as rejected:
        reject: Any = rejected  # its stub lacks requeue
        state = RunState.QUEUED if reject.requeue else RunState.FAILED
        # Celery's main process stores FAILURE for a message that is rejected for good (request.py:683).
        finish(hold, End(state=state, counts=not reject.requeue, delivered=not reject.requeue, error=line_of(rejected)))
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
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(hold.body.interruption, Cancelled):  # it failed while it tidied up
            reason = str(hold.body.interruption)
            finish(hold, End(state=RunState.CANCELLED, keeps_owner=True, reason=reason, error=line_of(error)))
            return tell_cancelled(task, hold, reason)
        failed(task, options, hold, as_failure(error), error)
    else:
        return succeeded(task, hold, value)
    raise AssertionError("unreachable: every branch above raises or returns")
