"""ScheduleBeat: Celery's beat Scheduler over the database. ``celery beat`` uses it where ``beat_scheduler`` says so."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from typing import Any, Final

import psutil
from celery.beat import Scheduler

from llmtasks.beat import sync, tick
from llmtasks.dispatch import Station, publish, station
from llmtasks.errors import BrokerUnavailableError, DatabaseUnavailableError, LLMTasksError
from llmtasks.keeper import Keeper
from llmtasks.store import processes
from llmtasks.store.processes import Process

logger = logging.getLogger(__name__)

#: The longest sleep between two looks at the database: how soon a change by another process takes effect.
POLL: Final = 0.05
#: Seconds between two tries while the database is away.
AWAY_PAUSE: Final = 1.0
#: Seconds between two looks for schedules that left the code.
REMOVED_EVERY: Final = 10.0


class ScheduleBeat(Scheduler):  # type: ignore[misc]  # Celery has no types of its own
    """Fires what is due in the database. Any number run side by side; what one claims the others pass over.

    Celery's own tick compares all entries for each firing; this one asks the database for the next due row.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._id = f"{socket.gethostname()[:40]}/{uuid.uuid4().hex[:12]}"
        self._declared: tuple[str, ...] | None = None
        self._keeper: Keeper | None = None
        self._away: str | None = None
        self._stamped_at = self._swept_at = -REMOVED_EVERY
        self._process = psutil.Process()
        super().__init__(*args, **kwargs)

    def setup_schedule(self) -> None:
        """Celery calls this once when beat starts; the rows are synced by the first tick that reaches the database."""
        # Celery's own entry that deletes old results, where the result backend needs it.
        entries: dict[str, Any] = dict(self.app.conf.beat_schedule or {})
        self.install_default_entries(entries)
        self.app.conf.beat_schedule = {**entries, **self._defaults}
        self._started = time.time()

    def update_from_dict(self, dict_: Any) -> None:
        """Celery hands over its default entries here."""
        self._defaults = dict(dict_)

    _defaults: dict[str, Any] = {}  # noqa: RUF012  # replaced, never changed

    @property
    def schedule(self) -> dict[str, Any]:
        """Celery's in-memory entries: none, all are in the database."""
        return {}

    @property
    def info(self) -> str:
        """What the banner shows below the scheduler's name."""
        return f"    . db -> {self._at.database.url.render_as_string()}"

    @property
    def _at(self) -> Station:
        return station(self.app)

    def tick(self, *_args: Any, **_kwargs: Any) -> float:
        """Fire what is due; returns the seconds to sleep. Never raises: that would end beat."""
        try:
            return self._tick()
        except BrokerUnavailableError as error:
            # What was claimed is in the outbox; claiming goes on, sending is the keeper's until the broker is back.
            self._say("broker", "messages wait in the outbox: %s", error)
            return POLL
        except DatabaseUnavailableError as error:
            self._say("database", "beat waits for the database: %s", error)
            return AWAY_PAUSE
        except LLMTasksError as error:
            self._say(type(error).__name__, "beat cannot go on: %s", error)
            return AWAY_PAUSE
        except Exception:
            logger.exception("a tick failed; beat goes on")
            return AWAY_PAUSE

    def sync(self) -> None:
        """Nothing is kept in memory that would have to be written."""

    def close(self) -> None:
        """Beat ends in order."""
        if self._keeper is not None:
            self._keeper.stop()
            try:
                with self._at.database.transaction() as tx:
                    processes.leave(tx, self._id)
            except LLMTasksError as error:
                logger.warning("this beat's row stays until it is forgotten: %s", error)

    def _tick(self) -> float:
        at = self._at
        if self._declared is None:
            self._declared = sync.sync(at)
            logger.info("%d schedules are declared in code", len(self._declared))
            self._keeper = Keeper(at)
            self._keeper.start()
        self._stamp(at)
        claimed, messages = tick.claim_due(at)
        if messages and self._away != "broker":
            publish(at, messages)
        elif messages:
            self._try_broker(at, messages)
        if self._away == "database":
            self._back()
        if claimed >= tick.BATCH:
            return 0.0
        return self._until_next(at)

    def _try_broker(self, at: Station, messages: list[Any]) -> None:
        publish(at, messages)
        self._back()

    def _until_next(self, at: Station) -> float:
        following = tick.next_due(at)
        if following is None:
            return POLL
        return max(0.0, min(POLL, (following - at.database.now()).total_seconds()))

    def _stamp(self, at: Station) -> None:
        """Say that this beat lives and what it declares; now and then look for what no beat declares any more."""
        now = time.monotonic()
        if now - self._stamped_at < at.settings.heartbeat:
            return
        self._stamped_at = now
        started = at.database.now()
        with at.database.transaction() as tx:
            processes.stamp(
                tx,
                Process(
                    id=self._id,
                    app=at.name,
                    kind="beat",
                    name=f"beat@{socket.gethostname()}",
                    pid=os.getpid(),
                    pool=None,
                    concurrency=None,
                    started_at=started,
                    heartbeat_at=started,
                    cpu_percent=self._process.cpu_percent(None),
                    memory=self._process.memory_info().rss,
                    declared=self._declared or (),
                ),
            )
        if now - self._swept_at >= REMOVED_EVERY:
            self._swept_at = now
            sync.complete_removed(at, self._declared or ())

    def _say(self, what: str, sentence: str, error: Exception) -> None:
        """Say an outage once."""
        if self._away != what:
            logger.warning(sentence, error)
        self._away = what

    def _back(self) -> None:
        logger.warning("the %s answers again; beat works", self._away)
        self._away = None
