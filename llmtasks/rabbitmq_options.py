"""What a RabbitMQ broker needs of Celery's settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

#: Celery's ``broker_transport_options``. Without confirms a message is sent into a socket that may be dead already, and
#: nobody hears that it is lost.
RABBITMQ_OPTIONS: Final[dict[str, Any]] = {"confirm_publish": True}


def is_rabbitmq(url: str) -> bool:
    """Whether ``url`` names a RabbitMQ server."""
    return url.partition("://")[0] in {"amqp", "amqps", "pyamqp"}


def declares_quorum(conf: Mapping[str, Any]) -> bool:
    """Whether an app's settings declare a quorum queue, which RabbitMQ refuses to give ``x-max-priority``.

    Args:
        conf: Celery's ``app.conf`` or any mapping.
    """
    kinds = (conf.get("task_default_queue_type"), conf.get("task_create_missing_queue_type"))
    queues: Any = conf.get("task_queues") or ()
    declared: Iterable[Any] = queues.values() if isinstance(queues, Mapping) else queues
    return "quorum" in kinds or any(_arguments(queue).get("x-queue-type") == "quorum" for queue in declared)


def _arguments(queue: Any) -> Mapping[str, Any]:
    """The arguments of a kombu Queue, or of one that is written as a dict."""
    found = queue.get("queue_arguments") if isinstance(queue, Mapping) else getattr(queue, "queue_arguments", None)
    return found or {}
