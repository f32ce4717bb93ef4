"""RunRequest: what the worker's main process does with a message of ours that its child could not end itself."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from typing import Any

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery.worker import request as celery_request
from celery.worker import state as worker_state

from llmtasks import sender
from llmtasks.dispatch import Station, relay, station
from llmtasks.errors import LLMTasksError
from llmtasks.holding import LEDGER_PAUSE
from llmtasks.owner import owner_of
from llmtasks.states import ENDED, RunState
from llmtasks.store import cancelling, outbox, rescue, runs
from llmtasks.store.runs import NewRun
from llmtasks.worker.gate import Gated
from llmtasks.worker.release import put_back

logger = logging.getLogger(__name__)

#: A child that passed its hard limit may live for another moment; its next attempt must not overlap.
AFTER_HARD_LIMIT = timedelta(seconds=1)


#: Its stubs describe an older Celery.
_Request: Any = celery_request.Request


class RunRequest(Gated, _Request):  # type: ignore[misc]  # Any as a base, see above
    """Writes ends to the ledger and acknowledges; tells Celery nothing itself: that is for a child, by replay."""

    #: It expired, but its run was begun before: the claim decides what its message is good for.
    _goes_on = False

    @property
    def _station(self) -> Station:
        return station(self._app)

    @property
    def _delivers(self) -> bool:
        return bool(self._request_dict.get(sender.DELIVER_HEADER))

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """A child died (lost, hard limit, sys.exit): end its attempt in the ledger. Other failures are the tracer's."""
        error = inner_error(exc_info)
        died = isinstance(error, WorkerLostError | TimeLimitExceeded | SystemExit | KeyboardInterrupt)
        if return_ok or not died or self._already_cancelled or self._already_revoked or worker_state.should_terminate:
            return super().on_failure(exc_info, send_failed_event, return_ok)
        worker_state.task_ready(self)
        if isinstance(error, SystemExit | KeyboardInterrupt):
            error = inner_error(self._worker_lost_info(error))
        try:
            self._end_attempt(error)
        except LLMTasksError as away:
            # The message comes back, and the lease ends what the row still says.
            logger.warning("run %s: its end cannot be written, the message goes back: %s", self.id, away)
            self.reject(requeue=True)
        return None

    def _end_attempt(self, error: Exception) -> None:
        at, owner = self._station, owner_of(self.worker_pid)
        line = f"{type(error).__name__}: {error}"
        failure = sender.backend_exception(self._app, error)
        delay = AFTER_HARD_LIMIT if isinstance(error, TimeLimitExceeded) else None
        now = at.database.now()
        with at.database.transaction() as tx:
            pending = rescue.lose(tx, rescue.owned_by(owner, self.id), now, error=line, failure=failure, delay=delay)
            rescue.abandon_end(tx, owner, self.id)
            known = rescue.state_of(tx, self.id)
        if known in {None, RunState.QUEUED} or (known is RunState.PENDING and self.id not in pending):
            self.reject(requeue=True)  # it died before its claim
        else:
            self.acknowledge()
        logger.warning("run %s: %s; it is %s", self.id, line, known)
        relay(at, pending)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Say a soft limit. At a hard one billiard calls ``on_failure`` first (pool.py:746), which does all."""
        if soft:
            super().on_timeout(soft, timeout)

    def revoked(self) -> bool:
        """Whether to drop the message. One that only tells an end must get through, revoked or expired or not."""
        return False if self._delivers else bool(super().revoked()) and not self._goes_on

    def maybe_expire(self) -> bool:
        """Whether it expired. Celery also remembers it as revoked, which the run's next message would meet."""
        known = self.id in worker_state.revoked
        expired = bool(super().maybe_expire())
        if expired and not known:
            worker_state.revoked.discard(self.id)
        return expired

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Revoked, terminated: cancelled in the ledger; expired: skipped. A replay tells results, links and chord.

        A copy of a message may outlive the run's first attempt: what another worker runs is not ended here.
        """
        try:
            ended = self._end_revoked(terminated, expired)
        except LLMTasksError as away:
            # Raised on, it would end the worker. The message comes back; not at once, the ledger is away.
            logger.warning("run %s: that it is %s cannot be written, the message goes back: %s", self.id, reason, away)
            worker_state.task_ready(self)
            time.sleep(LEDGER_PAUSE)
            self.reject(requeue=True)
            return
        if expired and not ended:
            self._goes_on = True
            return
        worker_state.task_ready(self)
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        self.acknowledge()
        self._already_revoked = True
        if ended:
            relay(self._station, [self.id])

    def _end_revoked(self, terminated: bool, expired: bool) -> bool:
        """Write that the message is revoked or expired; says whether its run has ended."""
        at = self._station
        now = at.database.now()
        state = RunState.SKIPPED if expired else RunState.CANCELLED
        words = "expired before it started" if expired else "terminated" if terminated else "revoked"
        with at.database.transaction() as tx:
            known = runs.get(tx, self.id)
            if known is None:
                runs.record_untold(tx, self._as_run(at, words), now, state)
            elif not known.func_name:
                runs.adopt_message(tx, self._as_run(at, words))
            elif expired:
                runs.end_unheld(tx, self.id, now, state, words)
            # A child was killed; a coroutine of this process tells its own end.
            elif not (
                terminated
                and self._is_in_child()
                and runs.end_unheld(tx, self.id, now, state, words, owner_of(self.worker_pid))
            ):
                cancelling.cancel(tx, at.name, self.id, now, words)
            ended = rescue.state_of(tx, self.id) in ENDED
            if ended:
                outbox.deliver(tx, at.name, self.id, now)
        return ended

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold shutdown, or a broker that went away: end what runs where the pool can, and release the run."""
        try:
            super().cancel(pool, signal, emit_retry)
        except NotImplementedError:  # a thread ends with its process
            self._announce_cancelled(emit_retry=False)

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        """Cold shutdown or a broker gone: this worker ends what runs. The run is released and nothing is counted."""
        at = self._station
        if self._is_in_child():
            self._release(at)  # its message is not acknowledged, and comes back
        else:
            put_back(at, self.id)
        super()._announce_cancelled(emit_retry=False)

    def _release(self, at: Station) -> None:
        try:
            with at.database.transaction() as tx:
                _, handed = rescue.release(tx, owner_of(self.worker_pid), self.id, at.database.now())
            relay(at, handed)
        except LLMTasksError as away:
            logger.warning("run %s cannot be released, its lease ends it: %s", self.id, away)

    def _is_in_child(self) -> bool:
        return bool(self.worker_pid != os.getpid())

    def _as_run(self, at: Station, reason: str) -> NewRun:
        context = self._context
        context.update(args=self.args, kwargs=self.kwargs)
        where = self.delivery_info or {}
        return NewRun(
            id=self.id,
            app=at.name,
            func_name=self.task.name,
            name=self.task.name,
            args=sender.dumps(list(self.args), "args"),
            kwargs=sender.dumps(dict(self.kwargs), "kwargs"),
            envelope=sender.envelope_of_request(context, self._ignore_result),
            queue=where.get("routing_key"),
            priority=sender.user_priority(self._app, where.get("priority")),
            reason=reason,
        )


def inner_error(exc_info: Any) -> Exception:
    """The error itself, out of billiard's ExceptionWithTraceback."""
    found: Exception = getattr(exc_info.exception, "exc", exc_info.exception)
    return found
