"""Celery's signals: one line each. Signals observe; what decides is the attempt and the request."""

from __future__ import annotations

import logging
from typing import Any

from celery import signals

from llmtasks import attempt, lifespan
from llmtasks.bridge import loops
from llmtasks.dispatch import station
from llmtasks.errors import DatabaseUnavailableError, SchemaOutdatedError
from llmtasks.holding import holdings
from llmtasks.keeper import Keeper
from llmtasks.owner import in_pool_child
from llmtasks.redis_options import STOCK_VISIBILITY, needs_stock
from llmtasks.run_task import RunTask
from llmtasks.sender import missing_socket_advice
from llmtasks.worker import watchdog
from llmtasks.worker.heartbeat import ProcessHeart
from llmtasks.worker.shutdown import Grace

logger = logging.getLogger(__name__)


class _Worker:
    """What runs beside the consumer in the main process of this worker."""

    keeper: Keeper | None = None
    heart: ProcessHeart | None = None
    grace: Grace | None = None


_worker = _Worker()


@signals.worker_init.connect
def say_what_is_missing(sender: Any, **_: object) -> None:
    """The worker starts: where its broker is a socket on which nobody listens, or promises less, say it."""
    url = str(sender.app.conf.broker_url or "")
    advice = missing_socket_advice(url)
    if advice is not None:
        logger.error(advice)
    if needs_stock(url):
        logger.warning(
            "Redis behind a Sentinel or in a cluster is left to stock kombu: what a killed worker had fetched and not "
            "started comes back after %d s, and a message can be lost at the moment it is fetched",
            sender.app.conf.broker_transport_options.get("visibility_timeout", STOCK_VISIBILITY),
        )


@signals.worker_init.connect
def check_schema(sender: Any, **_: object) -> None:
    """The worker starts: with tables of another version every message would fail, so it ends here."""
    database = station(sender.app).database
    try:
        with database.reading():
            pass
    except SchemaOutdatedError as error:
        raise SystemExit(str(error)) from error  # of receivers Celery lets nothing else through
    except DatabaseUnavailableError as away:
        logger.warning("the worker starts without its ledger: %s", away)
    finally:
        database.close()  # the pool's children are forked from here


@signals.celeryd_after_setup.connect
def begin_loop(instance: Any, **_: object) -> None:
    """The worker will start its pool: call the start hooks, unless children have the loops."""
    pool = _name_of(instance.pool)
    if pool == "prefork":
        lifespan.expect_children()
        return
    try:
        lifespan.begin(on_own=pool == "solo")
    except lifespan.HookError as error:
        logger.critical("the worker ends: %s", error, exc_info=error.__cause__)
        raise SystemExit(1) from error


@signals.worker_process_init.connect
def begin_loop_of_child(**_: object) -> None:
    """A prefork child starts, before its first run."""
    if not in_pool_child():
        return  # the solo pool says so too
    try:
        lifespan.begin(on_own=True)
    except lifespan.HookError as error:
        logger.critical("the worker ends: %s", error, exc_info=error.__cause__)
        lifespan.end_parent()
        raise SystemExit(1) from error


@signals.worker_ready.connect
def start_keeping(sender: Any, **_: object) -> None:
    """The worker consumes: keep runs moving and say that it lives."""
    at = station(sender.app)
    _worker.grace = Grace(sender, stop_keeping)
    _worker.keeper = Keeper(at)
    _worker.keeper.start()
    pool = sender.pool
    _worker.heart = ProcessHeart(at, name=sender.hostname, pool=_name_of(pool), concurrency=pool.num_processes)
    _worker.heart.start()


@signals.worker_ready.connect
def watch_loop(sender: Any, **_: object) -> None:
    """The worker consumes: where coroutines share its loop, say what blocks that."""
    if _name_of(sender.pool) == "asyncio":
        settings = station(sender.app).settings
        watchdog.watch(loops.shared(), warning=settings.loop_warning, limit=settings.loop_limit)


@signals.worker_shutting_down.connect
def bound_shutdown(sig: str, how: str, **_: object) -> None:
    """A warm shutdown waits for running runs, but not for ever: then they are put back, uncounted."""
    if how == "Warm" and _worker.grace is not None:
        _worker.grace.begin()


@signals.worker_shutdown.connect
def end_loop(sender: Any, **_: object) -> None:
    """The worker ends in order and no run is left: call the stop hooks, within the grace."""
    if lifespan.failed_in_child():
        sender.exitcode = 1
    left = station(sender.app).settings.shutdown_grace
    if _worker.grace is not None:
        left = _worker.grace.left()
        _worker.grace.cancel()
    lifespan.end(left)


@signals.worker_shutdown.connect
def stop_keeping(**_: object) -> None:
    """The worker ends, in order or by the end of its grace."""
    watchdog.stop()
    if _worker.keeper is not None:
        _worker.keeper.stop()
    if _worker.heart is not None:
        _worker.heart.stop()


@signals.worker_process_shutdown.connect
def flush_child(**_: object) -> None:
    """A prefork child ends in order: write down what it delivered."""
    holdings.flush()


@signals.worker_process_shutdown.connect
def end_loop_of_child(**_: object) -> None:
    """A prefork child ends in order: call the stop hooks; the end of the worker's grace ends the child."""
    lifespan.end(station().settings.shutdown_grace)


@signals.task_postrun.connect
def let_go(task: Any, **_: object) -> None:
    """The tracer lets go of a request."""
    if isinstance(task, RunTask):
        attempt.let_go(task)


def _name_of(pool: Any) -> str:
    """How people call a pool; Celery's own are called by their modules."""
    return str(getattr(pool, "name", type(pool).__module__.rpartition(".")[2]))
