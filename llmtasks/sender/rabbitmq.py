"""What is different where RabbitMQ is the broker: what it refuses, drops without a word, or may never answer."""

from __future__ import annotations

from typing import Any, Final

import celery
from celery.utils.quorum_queues import detect_quorum_queues

from llmtasks.errors import ConfigurationError
from llmtasks.sender.priority import driver_type

#: Seconds that RabbitMQ may take to confirm a message: one without memory or disk left never does.
CONFIRM_TIMEOUT: Final = 5
#: The AMQP classes whose methods declare something: exchanges and queues.
_DECLARING: Final = frozenset({40, 50})
#: ``basic.consume``.
_CONSUME: Final = (60, 20)

_ADVICE: Final = {
    403: "give its user the permission (rabbitmqctl set_permissions)",
    404: "declare it in task_queues, or let a worker that consumes it declare it",
    405: "it belongs to another connection",
    406: "it exists with other arguments: give it those in task_queues, or, when it is empty, delete it (rabbitmqctl "
    "delete_queue). llmtasks sets task_queue_max_priority to 9 where the app sets neither that nor a quorum queue",
}


def is_rabbitmq_transport(app: celery.Celery) -> bool:
    """Whether messages go through RabbitMQ."""
    return driver_type(app) == "amqp"


def publish_options(app: celery.Celery) -> dict[str, Any]:
    """Options of each message that is published."""
    return {"confirm_timeout": CONFIRM_TIMEOUT} if is_rabbitmq_transport(app) else {}


def abandon(app: celery.Celery, connection: Any) -> None:
    """Close a broken connection. A frozen RabbitMQ would be waited for without end to say goodbye."""
    if is_rabbitmq_transport(app):
        connection.collect()
    connection.release()


def broker_can_wait(app: celery.Celery) -> bool:
    """Whether a message may be delayed in the broker and its workers.

    Not with quorum queues: their prefetch is fixed (``worker/consumer/tasks.py:100``), so a few delayed messages would
    keep a worker from all others.
    """
    return not detect_quorum_queues(app, driver_type(app))[0]


def broker_tells_expiry(app: celery.Celery) -> bool:
    """Whether a worker hears of messages that expired: RabbitMQ drops them in their queue, and nobody is told."""
    return not is_rabbitmq_transport(app)


def refusal(app: celery.Celery, error: BaseException | None) -> ConfigurationError | None:
    """The error that says what RabbitMQ refuses and what to do; None where it refused no queue and no exchange."""
    method: Any = getattr(error, "method_sig", None)
    if not is_rabbitmq_transport(app) or not method:
        return None
    code, text = getattr(error, "reply_code", 0), getattr(error, "reply_text", "")
    asked = method[0] in _DECLARING or tuple(method) == _CONSUME or code == 404
    if not asked or code not in _ADVICE:
        return None
    return ConfigurationError(f"broker {app.connection_for_write().as_uri()} refuses: {text}; {_ADVICE[code]}")
