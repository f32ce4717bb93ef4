"""The embedded broker: a private Valkey server beside the application's data."""

from llmtasks.broker.embedded import EmbeddedBroker
from llmtasks.broker.leash import leashed
from llmtasks.sender import missing_socket_advice

__all__ = ["EmbeddedBroker", "leashed", "missing_socket_advice"]
