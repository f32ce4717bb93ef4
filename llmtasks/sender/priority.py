"""Priorities: 1 (first) to 10 for people; each transport counts in its own way. The only place that translates."""

from __future__ import annotations

import logging
from typing import Final
from weakref import WeakKeyDictionary

import celery

from llmtasks.options import DEFAULT_PRIORITY

logger = logging.getLogger(__name__)

#: Transports whose lowest number comes first, and those whose highest does; the others have no priorities.
_LOW_FIRST: Final = frozenset({"redis"})
_HIGH_FIRST: Final = frozenset({"amqp", "mongodb", "zookeeper"})

_transports: WeakKeyDictionary[celery.Celery, str] = WeakKeyDictionary()
_said: set[str] = set()


def native_priority(app: celery.Celery, priority: int | None) -> int | None:
    """A priority of 1 (first) to 10 as the app's transport counts; None where it has none, which is said once."""
    priority = DEFAULT_PRIORITY if priority is None else priority
    transport = driver_type(app)
    if transport in _LOW_FIRST:
        return priority - 1
    if transport in _HIGH_FIRST:
        return 10 - priority
    if priority != DEFAULT_PRIORITY and transport not in _said:
        _said.add(transport)
        logger.warning("the broker's transport %r has no priorities: runs start in the order they were sent", transport)
    return None


def transport_without_priorities(app: celery.Celery) -> str | None:
    """The name of the app's transport where it has no priorities, else None."""
    transport = driver_type(app)
    return None if transport in _LOW_FIRST | _HIGH_FIRST else transport


def user_priority(app: celery.Celery, native: int | None) -> int:
    """A message's native priority as 1 (first) to 10."""
    transport = driver_type(app)
    if native is None or transport not in _LOW_FIRST | _HIGH_FIRST:
        return DEFAULT_PRIORITY
    return min(10, max(1, native + 1 if transport in _LOW_FIRST else 10 - native))


def driver_type(app: celery.Celery) -> str:
    """The kind of broker that the app's transport speaks to, as kombu calls it, such as ``redis`` or ``amqp``."""
    driver = _transports.get(app)
    if driver is None:
        driver = _transports[app] = str(app.connection_for_write().get_transport_cls().driver_type)
    return driver
