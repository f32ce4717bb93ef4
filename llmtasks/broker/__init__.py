"""The embedded broker: a private Valkey server beside the application's data."""

from llmtasks.broker.embedded import EmbeddedBroker, missing_socket_advice
from llmtasks.broker.leash import leashed

__all__ = ["EmbeddedBroker", "leashed", "missing_socket_advice"]
