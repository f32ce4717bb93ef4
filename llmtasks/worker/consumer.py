"""The consumer that outlives its broker: Celery's own, with what it lacks where the broker goes away."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from typing import Any, Final

from celery.concurrency import prefork
from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer
from celery.worker.state import active_requests, maybe_shutdown

from llmtasks import sender
from llmtasks.worker.gate import Gate, Limits
from llmtasks.worker.pauses import Pauses

logger = logging.getLogger(__name__)

#: Seconds between two tries to reach the broker. Celery's own grow to 30 s, longer than most outages.
RETRY_EVERY: Final = 1.0

#: Seconds that an event of a task may wait for others, and how many go in one message at most. Celery sends them with
#: every turn of its loop, 24 at once at most: a message for every eighth run was a sixth of what an empty run costs.
EVENTS_WAIT: Final = 0.05
EVENTS_TOGETHER: Final = 500

#: It has no types.
_Blueprint: Any = Consumer.Blueprint


class RunConsumer(Consumer):
    """Celery's consumer. ``worker_consumer`` names it."""

    class Blueprint(_Blueprint):  # type: ignore[misc]  # Any as a base, see above
        """The steps of Celery's consumer, and ours."""

        default_steps = (*_Blueprint.default_steps, Limits, Pauses)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        celerys: Any = self
        self._events_are_due = False
        self.gate = Gate(self, celerys.on_task_request)
        celerys.on_task_request = self.gate.enter
        if sender.is_rabbitmq_transport(self.app):
            # RabbitMQ closes a channel on which a run takes longer than its consumer_timeout, and Celery would end the
            # worker (consumer.py:397). A new connection is all that is needed.
            celerys.connection_errors = (*celerys.connection_errors, *celerys.channel_errors)

    def stop(self) -> None:
        """The worker ends: it gives back what waits in it at once, before it waits for what runs."""
        self.gate.is_open = False
        super().stop()
        # Now that it does not consume any more: RabbitMQ would send it what it gives back.
        self.gate.give_back()
        celerys: Any = self
        if celerys.hub is not None:  # it would run what goes back only when the pool has drained
            run_ready: Callable[[Any], None] = vars(prefork)["_run_ready_callbacks"]
            run_ready(celerys.hub)

    def shutdown(self) -> None:
        """Nothing runs any more: what it said last is sent."""
        self._send_events()
        super().shutdown()

    def on_send_event_buffered(self) -> Any:
        """An event waits: it is sent with those that come in the next moment."""
        if not self._events_are_due:
            self._events_are_due = True
            celerys: Any = self
            celerys.event_dispatcher.buffer_limit = EVENTS_TOGETHER
            celerys.hub.call_later(EVENTS_WAIT, self._send_events)

    def _send_events(self) -> None:
        self._events_are_due = False
        celerys: Any = self
        if celerys.event_dispatcher is not None:
            celerys.event_dispatcher.flush()

    def on_close(self) -> None:
        """The connection is gone, and what was fetched and not begun is the broker's again; or the worker ends."""
        super().on_close()
        self._events_are_due = False  # timers may be gone with the connection
        if self.gate.is_open:
            self.gate.forget()

    def add_task_queue(
        self, queue: Any, exchange: Any = None, exchange_type: Any = None, routing_key: Any = None, **options: Any
    ) -> Any:
        """Consume one more queue, of the kind that senders declare: Celery makes each unknown one a classic queue."""
        if exchange is None and routing_key is None:
            with contextlib.suppress(KeyError):  # the app makes no queues that it does not know
                self.app.amqp.queues[queue]
        return super().add_task_queue(queue, exchange, exchange_type, routing_key, **options)

    def ensure_connected(self, conn: Any) -> Any:
        """Reach the broker, however long that takes; say once that it is away. Whether to retry is Celery's setting."""
        conf: Any = self.app.conf
        at_start, later = conf.broker_connection_retry_on_startup, conf.broker_connection_retry
        if not (at_start if self.first_connection_attempt and at_start is not None else later):
            return super().ensure_connected(conn)
        said = False

        def say(error: Exception, _interval: float) -> None:
            nonlocal said
            if not said:
                logger.error("cannot connect to %s, tried again every second: %s", conn.as_uri(), error)
            said = True

        conn = conn.ensure_connection(
            say,
            conf.broker_connection_max_retries,
            interval_start=RETRY_EVERY,
            interval_step=0,
            interval_max=RETRY_EVERY,
            callback=maybe_shutdown,
        )
        self.first_connection_attempt = False
        return conn

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Let what runs go on, and let it be acknowledged later: Redis does not mind through which connection.

        Celery closes the connection here, and kombu's channel then returns what is fetched and not acknowledged, what
        runs included.

        Raises:
            ConfigurationError: It is no outage, RabbitMQ refuses a queue; this ends the worker.
        """
        refused = sender.refusal(self.app, exc)
        if refused is not None:
            raise refused from exc
        channel: Any = getattr(getattr(self, "task_consumer", None), "channel", None)
        quality: Any = getattr(channel, "qos", None)
        if not hasattr(quality, "restore_at_shutdown"):  # not one of kombu's own transports
            super().on_connection_error_after_connected(exc)
            return
        transport, client = channel.connection, channel.connection.client
        quality.restore_at_shutdown = False
        with warnings.catch_warnings():
            # "These tasks cannot be acknowledged": here they can.
            warnings.simplefilter("ignore", CPendingDeprecationWarning)
            super().on_connection_error_after_connected(exc)
        if hasattr(quality, "keep"):  # our Redis transport
            # Celery drops what it had not started (on_close), so those messages are for whoever restores them.
            quality.keep({request.message.delivery_tag for request in tuple(active_requests)})
        else:
            # Without the address of its server stock kombu's acknowledgement raises an AttributeError, which ends the
            # worker (consumer.py:472 and :484 close the connection twice).
            channel.connection, transport.client = transport, client
