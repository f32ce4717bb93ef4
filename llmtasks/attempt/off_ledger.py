"""One attempt of a function whose ledger is off: called with our limits and our loop; no database hears of it."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

from celery.exceptions import Ignore, Reject, Retry
from celery.worker import state as worker_state

from llmtasks import sender
from llmtasks.attempt.calling import as_failure, call_function, current, install_soft_limit
from llmtasks.attempt.claiming import limits_of
from llmtasks.attempt.finishing import delay_before, is_final
from llmtasks.bridge import Body, NotYours
from llmtasks.holding import Cancelled, holdings
from llmtasks.options import TaskOptions


def run_off_ledger(task: Any, options: TaskOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function; what leaves this is what Celery's tracer is to see.

    Raises:
        Ignore: The run was revoked.
        Reject: The worker shuts down; the message goes back to the broker.
        Retry: The attempt failed; a message for the next one is with the broker.
        Exception: The run failed for good.
    """
    request = task.request
    request._protected = 1  # a nested call of the same task is a plain call
    if getattr(request, sender.DELIVER_HEADER, None):
        raise Ignore("it tells the end of a run from before the function's ledger was off")
    soft, hard = limits_of(task, request)
    body = Body(soft_limit=soft, hard_limit=hard)
    install_soft_limit()
    current.inside = True
    holdings.lend(request.id, body)
    try:
        if request.id in worker_state.revoked:  # since the worker looked; from now on it finds the body
            raise Ignore("revoked")
        return call_function(task, body, args, kwargs)
    except (Ignore, Reject, Retry):
        raise
    except (Exception, asyncio.CancelledError) as error:
        _end(task, options, body, error)
    finally:
        holdings.take_back(request.id, body)
        current.inside = False


def _end(task: Any, options: TaskOptions, body: Body, error: Exception | asyncio.CancelledError) -> NoReturn:
    """Raise what the end of the function means: it was interrupted, is to run again, or has failed."""
    interruption = body.interruption
    if isinstance(interruption, NotYours):
        raise Reject(str(interruption), requeue=True) from error
    if isinstance(interruption, Cancelled):
        raise Ignore(str(interruption)) from error
    failure = as_failure(error)
    retries = task.request.retries or 0
    if is_final(task, options, failure, retries, task.max_retries):
        raise failure
    task.retry(exc=failure, countdown=delay_before(options, retries, task.default_retry_delay))
    raise AssertionError("unreachable: retry raises")
