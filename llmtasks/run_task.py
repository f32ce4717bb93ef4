"""RunTask: the Celery task class of registered functions; it hands over to the attempt and to dispatch."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, Final

import celery
from celery import canvas
from celery.exceptions import Retry
from kombu.exceptions import EncodeError

from llmtasks import accepting, attempt, bridge, sender
from llmtasks.attempt.results import BackendOnLoop
from llmtasks.checks import check_number, check_whole
from llmtasks.errors import BrokerUnavailableError, InvalidOptionError, InvalidParamsError
from llmtasks.options import TaskOptions

#: A delay longer than this is kept in the database; shorter ones wait in the worker as Celery has it.
BROKER_DELAY: Final = 5.0
#: Messages of map_delay that one round trip carries.
MAP_BATCH: Final = 500


#: Their stubs describe an older Celery.
_Signature: Any = canvas.Signature
_Task: Any = celery.Task


class _KeptSignature(_Signature):  # type: ignore[misc]  # Any as a base, see above
    """What ``self.retry()`` would publish at once; the ledger keeps it instead."""

    def apply_async(self, *_args: Any, **_options: Any) -> None:
        """Publish nothing."""


class RunTask(_Task):  # type: ignore[misc]  # Any as a base, see above
    """A Celery task whose runs are in the ledger. Made by ``task_registry.register`` only."""

    abstract = True
    Request = "llmtasks.worker.request:RunRequest"
    acks_late = True
    #: Set by the registry on each task's own class.
    options: ClassVar[TaskOptions]
    #: Whether the ledger has its runs.
    is_recorded: ClassVar[bool] = True
    function: ClassVar[Callable[..., Any]]
    parameters: ClassVar[tuple[str, ...]]
    takes_self: ClassVar[bool]
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

    # -- in a worker

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

    # -- publishing

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        **options: Any,
    ) -> Any:
        """Send a run, as Celery does. ``priority`` is 1 (first) to 10; a delay over 5 s is kept in the database.

        A run of a unique function is in the database before it is sent: where it would be a duplicate, the handle
        returned is that of the run that is there. So is, with RabbitMQ, a run that expires, and with quorum queues any
        delay.

        Raises:
            InvalidOptionError: An option has a value that it cannot have.
            InvalidParamsError: The arguments do not fit the function, or JSON cannot carry them.
            DuplicateRunError: The function is unique and refuses a second run.
            ConfigurationError: The broker has no such queue, or has it with other arguments.
            BrokerUnavailableError: The broker does not answer.
        """
        if bridge.tracer_here() is not None:  # a link or the chain's next step: the loop goes on meanwhile
            send = partial(self.apply_async, args, kwargs, task_id, producer, link, link_error, shadow, **options)
            return bridge.in_thread(send)
        if options.get("serializer", "json") != "json":
            raise InvalidOptionError(
                "serializer", options["serializer"], "'json'", "The ledger keeps arguments as JSON."
            )
        priority = options.pop("priority", None)
        if priority is None:
            priority = self.options.priority
        else:
            check_whole("priority", priority, 1, 10)
        if not self.app.conf.task_always_eager:
            delay = self._delay(options.get("countdown"), options.get("eta"))
            if self._is_kept(delay, options.get("expires", self.expires)):
                self._check_arguments(args, kwargs, None)
                named = {**options, "link": link, "link_error": link_error, "shadow": shadow}
                kept = accepting.keep(self, args, kwargs, task_id, delay, priority, **named)
                if kept is not None:
                    return kept
        options = {**sender.publish_options(self.app), **options}
        options["priority"] = sender.native_priority(self.app, priority)
        options["headers"] = {**(options.get("headers") or {}), sender.SENT_HEADER: time.time()}
        if self.options.queue is not None and not {"queue", "exchange", "routing_key"} & set(options):
            options["queue"] = self.options.queue
        try:
            return super().apply_async(args, kwargs, task_id, producer, link, link_error, shadow, **options)
        except EncodeError:
            self._check_json(args, kwargs)
            raise
        except sender.gone(self.app) as error:
            raise sender.refusal(self.app, error) or self._outage(error) from error
        except RuntimeError as error:
            # What the Redis result backend makes of a connection error (backends/asynchronous.py:390).
            if isinstance(error.__cause__, sender.gone(self.app)):
                raise self._outage(error.__cause__) from error
            raise
        except TypeError as error:
            if isinstance(error, InvalidParamsError):
                raise
            self._check_arguments(args, kwargs, error)
            raise

    async def adelay(self, *args: Any, **kwargs: Any) -> Any:
        """``delay`` for code on an event loop: the broker is spoken to in a thread."""
        return await asyncio.to_thread(self.delay, *args, **kwargs)

    def map_delay(self, items: Iterable[Any]) -> list[Any]:
        """Send one run for each item, many in one round trip where the broker's transport can.

        Args:
            items: A tuple is taken as the positional arguments, a dict as the keyword arguments, anything else as the
                only argument.

        Returns:
            The results' handles in the items' order.
        """
        sent: list[Any] = []
        with self.app.producer_or_acquire() as producer, producer.batch(max_size=MAP_BATCH):
            for args, kwargs in map(_arguments_of, items):
                sent.append(self.apply_async(args, kwargs, producer=producer))
        return sent

    def _outage(self, error: BaseException) -> BrokerUnavailableError:
        """The error of a broker that is away.

        While the tracer tells an end (links, the chain's next step), it must not be kombu's too: for that the tracer
        stores FAILURE (trace.py:627). Any other leaves the end to be told again.
        """
        away = sender.outage(self.app, error)
        return BrokerUnavailableError(str(away)) if attempt.is_telling() else away

    def _is_kept(self, delay: float, expires: Any) -> bool:
        """Whether the database has to keep the run: until its time, or because the broker would drop it in silence."""
        if self.options.unique or delay > BROKER_DELAY or (delay > 0 and not sender.broker_can_wait(self.app)):
            return True
        return expires is not None and not sender.broker_tells_expiry(self.app)

    def _delay(self, countdown: Any, eta: Any) -> float:
        check_number("countdown", countdown)
        if countdown:
            return float(countdown)
        if isinstance(eta, str):
            eta = datetime.fromisoformat(eta)
        if isinstance(eta, datetime):
            aware = eta if eta.tzinfo else eta.replace(tzinfo=self.app.timezone)
            return (aware - datetime.now(UTC)).total_seconds()
        return 0.0

    def _check_arguments(self, args: Any, kwargs: Any, error: TypeError | None) -> None:
        """Raise InvalidParamsError where the arguments do not fit the function's signature."""
        bound = (self, *(args or ())) if self.takes_self else tuple(args or ())
        try:
            inspect.signature(self.function).bind(*bound, **(kwargs or {}))
        except TypeError as misfit:
            raise InvalidParamsError(
                f"arguments of {self.name!r} do not fit its signature {inspect.signature(self.function)}: {misfit}"
            ) from error

    def _check_json(self, args: Any, kwargs: Any) -> None:
        sender.dumps(list(args or ()), "args")
        sender.dumps(dict(kwargs or {}), "kwargs")


def body_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The sync function that Celery's tracer runs for a task function, sync or async."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return attempt.call_body(function, args, kwargs)

    return run


def _arguments_of(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(item, tuple):
        return item, {}
    if isinstance(item, dict):
        return (), item
    return (item,), {}
