"""llmtasks.install(app): what an existing Celery app needs to run registered functions; and the built-in schedule."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any, Final

from kombu import transport as transports

# Connects the receivers before a worker forks.
import llmtasks.worker.signals  # noqa: F401  # pyright: ignore[reportUnusedImport]
from llmtasks.dispatch import station
from llmtasks.rabbitmq_options import declares_quorum
from llmtasks.redis_options import transport_options
from llmtasks.registry import task_registry
from llmtasks.settings import TaskDefaults, read, redis_transport
from llmtasks.store import purging

logger = logging.getLogger(__name__)

#: Our Redis transport, by name, so that it is imported only where a broker is reached; and the URL schemes that lead to
#: it. To an app that did not choose it (``redis_transport``) it is kombu's own.
TRANSPORT: Final = "llmtasks.broker.redis:Transport"
SCHEMES: Final = ("redis", "rediss", "valkey", "llmtasks", "llmtasks+redis", "llmtasks+rediss")
#: Settings that installing gives an app where it has none of its own.
DEFAULTS: Final[dict[str, Any]] = {
    "beat_enable_remote_control": True,
    "beat_scheduler": "llmtasks",
    "broker_connection_max_retries": None,
    "broker_connection_retry_on_startup": True,
    "result_backend_transport_options": {
        "retry_policy": {"max_retries": 3, "interval_start": 0, "interval_step": 0.5, "interval_max": 1}
    },
    "task_queue_max_priority": 9,
    "task_send_sent_event": True,
    "worker_consumer": "llmtasks.worker.consumer:RunConsumer",
    "worker_prefetch_multiplier": 1,
    "worker_proc_alive_timeout": 60.0,
    "worker_send_task_events": True,
}
PURGE: Final = "llmtasks.purge"


def install(app: Any) -> Any:
    """Let a Celery app run registered functions: settings that are unset, the beat scheduler, the worker's keeper.

    Its own tasks stay as they are. Its ``beat_schedule`` and ``add_periodic_task`` entries become schedules in the
    database.

    Args:
        app: The Celery app.

    Returns:
        The same app.
    """
    # Celery's current app is the thread's own; in a web server's threads `current_app` is the default one.
    app.set_default()
    # The app may still be told its configuration: its settings are read at their first use, not here.
    app.on_after_configure.connect(_complete, weak=False, dispatch_uid="llmtasks.install")
    if app.configured:
        _complete(app, app.conf)
    return app


def _complete(sender: Any, source: Any, **_: object) -> None:
    """Put ours below the app's own settings and above Celery's defaults, which come last."""
    ours = dict(DEFAULTS)
    if not source.broker_url:
        settings = read(source)
        ours["broker_url"] = settings.broker_url
        if not source.result_backend:
            ours["result_backend"] = settings.result_url
    if declares_quorum(source):
        del ours["task_queue_max_priority"]
    if source.get("TASK_CONFIG"):
        ours["worker_concurrency"] = TaskDefaults.read(source["TASK_CONFIG"]).concurrency(str(source.worker_pool))
    for settings_in_order in (source.maps, source.defaults):
        settings_in_order.insert(-1, ours)
    options = transport_options(str(source.broker_url), redis_transport(source))
    if options:
        source["broker_transport_options"] = {**options, **(source.get("broker_transport_options") or {})}


def _offer_transport() -> None:
    """Register our Redis transport with kombu, which forgets what it found under those names before."""
    for scheme in SCHEMES:
        transports.TRANSPORT_ALIASES[scheme] = TRANSPORT
        # kombu/transport/__init__.py:92: an alias that was used once is not looked up again.
        getattr(transports, "_transport_cache", {}).pop(scheme, None)


_offer_transport()


@task_registry.register(name=PURGE, schedule="17 3 * * *", max_instances=1, max_retries=1, retry_delay=600)
def purge_runs(older_than_days: float | None = None) -> int:
    """Delete runs that ended longer ago than ``keep_runs_days``, in slices; returns how many.

    Live runs and ends that Celery was not told stay, whatever their age.
    """
    at = station()
    days = at.settings.keep_runs_days if older_than_days is None else older_than_days
    return sum(purging.purge(at.database, at.name, at.database.now() - timedelta(days=days)))
