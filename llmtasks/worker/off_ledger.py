"""OffLedgerRequest: what the worker's main process does with a message of a function whose ledger is off."""

from __future__ import annotations

from typing import Any

from billiard.exceptions import TimeLimitExceeded
from celery.worker import request as celery_request
from celery.worker import state as worker_state

from llmtasks.worker.gate import Gated
from llmtasks.worker.request import inner_error

#: Its stubs describe an older Celery.
_Request: Any = celery_request.Request


class OffLedgerRequest(Gated, _Request):  # type: ignore[misc]  # Any as a base, see above
    """Celery's request; a child that was ended at its hard limit has its retries too."""

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """An attempt failed; the tracer has told what it could."""
        error = inner_error(exc_info)
        most = self.task.max_retries
        ended = isinstance(error, TimeLimitExceeded) and not (
            return_ok or self._already_cancelled or self._already_revoked or worker_state.should_terminate
        )
        if ended and (most is None or self._context.retries < most):
            worker_state.task_ready(self)
            if self._retry_worker_lost(error, exc_info):
                return None
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Say a soft limit. At a hard one billiard calls ``on_failure`` first (pool.py:746), which does all."""
        if soft:
            super().on_timeout(soft, timeout)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold shutdown, or a broker that went away: end what runs where the pool can."""
        try:
            super().cancel(pool, signal, emit_retry)
        except NotImplementedError:  # a thread ends with its process
            self._announce_cancelled(emit_retry=emit_retry)
