"""RunTask: the Celery task class of registered functions; in a worker it hands over to the attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from celery import canvas
from celery.exceptions import Retry

from llmtasks import attempt, bridge, sender
from llmtasks.attempt.results import BackendOnLoop
from llmtasks.sent_task import SentTask

#: Its stubs describe an older Celery.
_Signature: Any = canvas.Signature


class _KeptSignature(_Signature):  # type: ignore[misc]  # Any as a base, see above
    """What ``self.retry()`` would publish at once; the ledger keeps it instead."""

    def apply_async(self, *_args: Any, **_options: Any) -> None:
        """Publish nothing."""


class RunTask(SentTask):
    """A Celery task whose runs are in the ledger. Made by ``task_registry.register`` only."""

    abstract = True
    Request = "llmtasks.worker.request:RunRequest"
    acks_late = True
    #: Set by the registry on each task's own class.
    #: Whether the ledger has its runs.
    is_recorded: ClassVar[bool] = True
    parameters: ClassVar[tuple[str, ...]]
    #: What ``track_started`` asked for; the attempt does it, after the claim.
    says_started: ClassVar[bool | None] = None

    @classmethod
    def bind(cls, app: Any) -> Any:
        """Connect to an app: the defaults of its TASK_CONFIG become Celery's limits and retries."""
        bound = super().bind(app)
        resolved = cls.options.with_defaults(sender.settings_of(app).tasks)
        cls.max_retries = resolved.max_retries
        cls.default_retry_delay = resolved.retry_delay
        cls.soft_time_limit = resolved.soft_time_limit
        cls.time_limit = resolved.time_limit
        # What may retry or requeue behind the ledger's back stays off, whatever the app's settings say.
        cls.acks_late = cls.acks_on_failure = cls.acks_on_timeout = cls.acks_on_failure_or_timeout = True
        cls.reject_on_worker_lost = cls.retry_on_worker_lost = False
        if cls.says_started is None:
            cls.says_started = bool(cls.track_started)
        cls.track_started = False
        cls.priority = None
        bridge.identify(cls.request_stack)
        return bound

    @property
    def backend(self) -> Any:
        """Celery's result backend; for a tracer on a loop one that does not block it."""
        tracer = bridge.tracer_here()
        return self.backend_of_thread if tracer is None else BackendOnLoop(self, tracer)

    @backend.setter
    def backend(self, value: Any) -> None:
        self._backend = value

    @property
    def backend_of_thread(self) -> Any:
        """Celery's result backend in this thread."""
        return self.app.backend if self._backend is None else self._backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run an attempt where a worker's tracer calls, and the function itself where anybody else does."""
        request = self.request_stack.top
        if request is None or request.called_directly or request.is_eager or attempt.hold_of(request) is not None:
            if request is not None and request.is_eager and attempt.hold_of(request) is None:
                return self.run(*args, **kwargs)
            return self._inline(*args, **kwargs)
        return attempt.run_attempt(self, self.options, args, kwargs)

    def _inline(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs) if self.takes_self else self.function(*args, **kwargs)

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Celery has stored the outcome and told links and chord."""
        attempt.after_return(self, self.options, status, retval)

    def signature_from_request(self, *args: Any, **kwargs: Any) -> Any:
        """What a retry would send; inside an attempt it is kept, not sent."""
        made = super().signature_from_request(*args, **kwargs)
        return _KeptSignature(made, app=self.app) if attempt.hold_of(self.request) else made

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """End this attempt and have another one later: as Celery's own, but the ledger keeps it."""
        hold = attempt.hold_of(self.request)
        if hold is None:
            return super().retry(*args, **kwargs)
        if len(args) < 7 and kwargs.get("max_retries") is None:
            kwargs["max_retries"] = hold.claim.max_retries
        try:
            made = super().retry(*args, **kwargs)
        except Retry:
            raise
        except Exception:
            self.request.llm_final = True  # its own count is used up; our policy must not add to it
            raise
        self.request.llm_retry = made  # throw=False: raised after the function returned
        return made

    def on_replace(self, sig: Any) -> Any:
        """Give the run to another signature, in the ledger first."""
        hold = attempt.hold_of(self.request)
        if hold is None:
            return super().on_replace(sig)
        return attempt.replaced(self, hold, sig)


def body_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The sync function that Celery's tracer runs for a task function, sync or async."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return attempt.call_body(function, args, kwargs)

    return run
