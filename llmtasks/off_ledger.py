"""OffLedgerTask: the Celery task class of functions registered with ``ledger="off"``."""

from __future__ import annotations

from typing import Any

from celery.exceptions import Ignore, Reject, Retry

from llmtasks import attempt, sender
from llmtasks.run_task import RunTask


class OffLedgerTask(RunTask):
    """A Celery task whose runs touch no database: Celery and the broker alone keep them.

    It has what needs no ledger: coroutines, limits, priorities, the queue, checked arguments, and retries, of which
    each is a message of its own.
    """

    abstract = True
    Request = "llmtasks.worker.off_ledger:OffLedgerRequest"
    is_recorded = False

    @classmethod
    def bind(cls, app: Any) -> Any:
        """Connect to an app; what the ledger does for others is Celery's here."""
        bound = super().bind(app)
        cls.track_started = cls.says_started
        # Celery acknowledges the message of a child that died, and would call the run failed.
        cls.retry_on_worker_lost = True
        return bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run an attempt where a worker's tracer calls, and the function itself where anybody else does."""
        request = self.request_stack.top
        if request is not None and request.is_eager:
            return self.run(*args, **kwargs)
        if request is None or request.called_directly or request._protected:
            return self._inline(*args, **kwargs)
        return attempt.run_off_ledger(self, self.options, args, kwargs)

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """End this attempt and send a message for another one: as Celery's own.

        Where the broker does not take that message, this one goes back to it; Celery's would be dropped.
        """
        try:
            return super().retry(*args, **kwargs)
        except Reject as rejected:
            unsent: Any = rejected  # its stub lacks what it is made of
            raise Reject(unsent.reason, requeue=True) from rejected
        except (Retry, Ignore):
            raise
        except Exception:
            self.request.llm_final = True  # its own count is used up; our policy must not add to it
            raise

    def signature_from_request(self, *args: Any, **kwargs: Any) -> Any:
        """What a retry sends; its priority is the message's, in our numbers."""
        made = super().signature_from_request(*args, **kwargs)
        if made.options.get("priority") is not None and "priority" not in kwargs:
            made.options["priority"] = sender.user_priority(self.app, made.options["priority"])
        return made

    def _is_kept(self, delay: float, expires: Any) -> bool:
        return False
