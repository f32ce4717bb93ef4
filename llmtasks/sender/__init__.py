"""The border to Celery for everything that is sent: messages, priorities, revokes, states."""

from llmtasks.sender.advice import missing_socket_advice
from llmtasks.sender.apps import current_app, settings_of
from llmtasks.sender.asking import (
    RedisServer,
    answering,
    celery_state_soon,
    consumed_queues,
    pickle_settings,
    queue_of,
    redis_server,
    stock_visibility,
)
from llmtasks.sender.batches import Batch, is_shared
from llmtasks.sender.envelope import (
    DELIVER_HEADER,
    SENT_HEADER,
    absolute,
    envelope_of_options,
    envelope_of_request,
    ignores_result,
    is_handed,
)
from llmtasks.sender.jsontext import dumps, loads
from llmtasks.sender.priority import native_priority, transport_without_priorities, user_priority
from llmtasks.sender.publishing import (
    HOPELESS,
    backend_exception,
    celery_state,
    gone,
    lost_failure,
    outage,
    publish,
    queue_length,
    revoke,
)
from llmtasks.sender.rabbitmq import (
    broker_can_wait,
    broker_tells_expiry,
    is_rabbitmq_transport,
    publish_options,
    refusal,
)

__all__ = [
    "DELIVER_HEADER",
    "HOPELESS",
    "SENT_HEADER",
    "Batch",
    "RedisServer",
    "absolute",
    "answering",
    "backend_exception",
    "broker_can_wait",
    "broker_tells_expiry",
    "celery_state",
    "celery_state_soon",
    "consumed_queues",
    "current_app",
    "dumps",
    "envelope_of_options",
    "envelope_of_request",
    "gone",
    "ignores_result",
    "is_handed",
    "is_rabbitmq_transport",
    "is_shared",
    "loads",
    "lost_failure",
    "missing_socket_advice",
    "native_priority",
    "outage",
    "pickle_settings",
    "publish",
    "publish_options",
    "queue_length",
    "queue_of",
    "redis_server",
    "refusal",
    "revoke",
    "settings_of",
    "stock_visibility",
    "transport_without_priorities",
    "user_priority",
]
