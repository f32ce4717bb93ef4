"""SentTask: a registered function as those see it who send its runs."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, Final

import celery
from kombu.exceptions import EncodeError

from llmtasks import accepting, aside, attempt, bridge, bulk, sender
from llmtasks.checks import check_number, check_whole
from llmtasks.errors import BrokerUnavailableError, InvalidOptionError, InvalidParamsError
from llmtasks.options import DEFAULT_PRIORITY, TaskOptions
from llmtasks.result import RunResult

#: A delay longer than this is kept in the database; shorter ones wait in the worker as Celery has it.
BROKER_DELAY: Final = 5.0

#: Its stubs describe an older Celery.
_Task: Any = celery.Task


class SentTask(_Task):  # type: ignore[misc]  # Any as a base, see above
    """A Celery task with options of ours. Its subclass ``RunTask`` says what a worker does with a run."""

    abstract = True
    #: Set by the registry on each task's own class.
    options: ClassVar[TaskOptions]
    function: ClassVar[Callable[..., Any]]
    takes_self: ClassVar[bool]

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
        options = self._checked(options)
        priority = self._priority(options.pop("priority", None))
        eager = self.app.conf.task_always_eager
        if not eager and self.is_kept(options):
            self._check_arguments(args, kwargs, None)
            delay = self._delay(options.get("countdown"), options.get("eta"))
            named = {**options, "link": link, "link_error": link_error, "shadow": shadow}
            kept = accepting.keep(self, args, kwargs, task_id, delay, priority, **named)
            if kept is not None:
                return kept
        options = self.publish_options(options, priority)
        try:
            if eager or producer or link or link_error or not sender.is_shared(self, options):
                options["headers"] = {**(options.get("headers") or {}), sender.SENT_HEADER: time.time()}
                return super().apply_async(args, kwargs, task_id, producer, link, link_error, shadow, **options)
            self.check_header(args, kwargs)
            batch = sender.Batch(self, {**options, "shadow": shadow}, args, kwargs)
            result = batch.add(args, kwargs, task_id)
            batch.send()
            return result
        except Exception as error:
            explained = self.explained(error, args, kwargs)
            if explained is error:
                raise
            raise explained from (error.__cause__ if isinstance(error, RuntimeError) else error)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> RunResult[Any]:  # noqa: N802 - Celery's name
        """The handle of a run's result."""
        return RunResult(task_id, **{"backend": self.backend, "task_name": self.name, "app": self.app, **kwargs})

    async def adelay(self, *args: Any, **kwargs: Any) -> Any:
        """``delay`` for code on an event loop: the broker is spoken to in a thread, which is none of asyncio's own."""
        return await aside.delay(self, args, kwargs)

    def map_delay(self, items: Iterable[Any], **options: Any) -> list[Any]:
        """Send one run for each item, 500 in one round trip where the broker's transport can.

        The items of a round trip are checked before any of them is sent: a bad one leaves out its own 500 and what
        would follow. What went before is sent; the error's ``sent`` has the handles.

        Args:
            items: A tuple is taken as the positional arguments, a dict as the keyword arguments, anything else as the
                only argument. They may come from a generator, and are taken when their turn comes.
            options: Those of ``apply_async``, for all runs alike; not ``task_id``.

        Returns:
            The results' handles in the items' order.

        Raises:
            InvalidParamsError: An item does not fit, and the error says which.
            BrokerUnavailableError: The broker does not answer; which items were sent, the error says.
        """
        return bulk.send_each(self, items, options)

    # -- what sending one and many have in common

    def is_kept(self, options: Mapping[str, Any]) -> bool:
        """Whether the database has to keep the run: until its time, or because the broker would drop it in silence."""
        delay = self._delay(options.get("countdown"), options.get("eta"))
        if self.options.unique or delay > BROKER_DELAY or (delay > 0 and not sender.broker_can_wait(self.app)):
            return True
        return options.get("expires", self.expires) is not None and not sender.broker_tells_expiry(self.app)

    def publish_options(self, options: Mapping[str, Any], priority: int | None = None) -> dict[str, Any]:
        """Options of ``apply_async`` as Celery and the transport understand them."""
        if priority is None:
            options = self._checked(options)
            priority = self._priority(options.pop("priority", None))
        made = {**sender.publish_options(self.app), **options, "priority": sender.native_priority(self.app, priority)}
        if self.options.queue is not None and not {"queue", "exchange", "routing_key"} & set(options):
            made["queue"] = self.options.queue
        return made

    def check_header(self, args: Any, kwargs: Any) -> None:
        """Check the arguments as Celery does, which is quick.

        Raises:
            TypeError: They do not fit.
        """
        if self.typing:
            self.__header__(*(args or ()), **(kwargs or {}))

    def explained(self, error: Exception, args: Any, kwargs: Any) -> Exception:
        """What to raise for an error of sending: one that says what to do, or the error itself."""
        try:
            if isinstance(error, EncodeError):
                self._check_json(args, kwargs)
            elif isinstance(error, sender.gone(self.app)):
                return sender.refusal(self.app, error) or self._outage(error)
            # What the Redis result backend makes of a connection error (backends/asynchronous.py:390).
            elif isinstance(error, RuntimeError) and isinstance(error.__cause__, sender.gone(self.app)):
                return self._outage(error.__cause__)
            elif isinstance(error, TypeError) and not isinstance(error, InvalidParamsError):
                self._check_arguments(args, kwargs, error)
        except InvalidParamsError as invalid:
            return invalid
        return error

    def _outage(self, error: BaseException) -> BrokerUnavailableError:
        """The error of a broker that is away.

        While the tracer tells an end (links, the chain's next step), it must not be kombu's too: for that the tracer
        stores FAILURE (trace.py:627). Any other leaves the end to be told again.
        """
        away = sender.outage(self.app, error)
        return BrokerUnavailableError(str(away)) if attempt.is_telling() else away

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        if options.get("serializer", "json") != "json":
            raise InvalidOptionError(
                "serializer", options["serializer"], "'json'", "The ledger keeps arguments as JSON."
            )
        return dict(options)

    def _priority(self, given: int | None) -> int:
        """The priority asked for, else the function's; the parent's where ``task_inherit_parent_priority`` says so."""
        if given is not None:
            check_whole("priority", given, 1, 10)
            return given
        parent = self.app.current_worker_task
        if parent and self.options.priority == DEFAULT_PRIORITY and self.app.conf.task_inherit_parent_priority:
            return sender.user_priority(self.app, (parent.request.delivery_info or {}).get("priority"))
        return self.options.priority

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
