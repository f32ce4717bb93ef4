"""Which transport a Redis broker gets, and with which options; everything that its URL says about that."""

from __future__ import annotations

from typing import Any, Final

from llmtasks.rabbitmq_options import RABBITMQ_OPTIONS, is_rabbitmq

#: ``llmtasks+redis://host`` means our Redis transport whatever the settings say.
EXPLICIT: Final = "llmtasks"
#: Priorities that Redis keeps apart; kombu's own four steps would lose the order of the others.
PRIORITY_STEPS: Final = list(range(10))
#: Seconds after which our transport gives a message to somebody else. Who holds one stamps it each second.
VISIBILITY: Final = 12.0
#: The same for stock kombu, which never stamps: longer than any run, or it would be handed out again while it runs.
STOCK_VISIBILITY: Final = 43_200

_ORDER: Final[dict[str, Any]] = {"priority_steps": PRIORITY_STEPS, "queue_order_strategy": "priority"}
#: Celery's ``broker_transport_options`` for each value of the setting ``redis_transport``.
REDIS_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "llmtasks": {**_ORDER, "redis_transport": "llmtasks"},
    "stock": {
        **_ORDER,
        "visibility_timeout": STOCK_VISIBILITY,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
    },
}


def transport_options(broker_url: str, transport: str) -> dict[str, Any]:
    """Celery's ``broker_transport_options`` for a broker; none unless it is Redis or RabbitMQ.

    Args:
        broker_url: Celery's broker.
        transport: The setting ``redis_transport``.
    """
    if needs_stock(broker_url):
        transport = "stock"
    elif not is_redis(broker_url):
        return dict(RABBITMQ_OPTIONS) if is_rabbitmq(broker_url) else {}
    return dict(REDIS_OPTIONS[transport])


def needs_stock(broker_url: str) -> bool:
    """Whether only stock kombu serves this kind of Redis: behind a Sentinel, or a cluster."""
    scheme = broker_url.partition("://")[0]
    return "sentinel" in scheme or "cluster" in scheme


def is_redis(url: str) -> bool:
    """Whether ``url`` names a Redis or Valkey server."""
    scheme = url.removeprefix(f"{EXPLICIT}+").split(":", 1)[0].split("+", 1)[0]
    return scheme in {"redis", "rediss", "valkey", "valkeys"}


def redis_spelling(url: str) -> str:
    """``valkey`` as ``redis``, which is what Celery, its result backends and Flower know."""
    return f"redis{url.removeprefix('valkey')}" if url.startswith("valkey") else url
