"""ScheduleBeat: Celery's beat Scheduler over the database. ``celery beat`` uses it where ``beat_scheduler`` says so."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from celery.beat import Scheduler

from llmtasks import sender
from llmtasks.beat import sync, tick
from llmtasks.beat.interrupts import undisturbed
from llmtasks.beat.ping import be_quiet
from llmtasks.dispatch import Station, publish, station
from llmtasks.errors import BrokerUnavailableError, DatabaseUnavailableError, LLMTasksError
from llmtasks.keeper import Keeper
from llmtasks.registry import task_registry
from llmtasks.store import processes
from llmtasks.store.processes import Process
from llmtasks.store.waking import Waking

if TYPE_CHECKING:
    import psutil

logger = logging.getLogger(__name__)

#: The longest sleep between two ticks: Celery asks often enough whether beat still lives.
LONGEST_SLEEP: Final = 1.0
#: Seconds between two ticks while the broker is away.
NO_BROKER_PAUSE: Final = 0.05
#: Seconds before another look at due rows that others have locked.
LOCKED_PAUSE: Final = 0.01
#: Seconds from the begin of a tick that fires something to the next: a tick takes 2 ms, each run in it 0.3 ms.
GATHER_TIME: Final = 0.03
#: Seconds between two tries while the database is away.
AWAY_PAUSE: Final = 1.0
#: Seconds between two looks for schedules that left the code.
REMOVED_EVERY: Final = 10.0
#: What is missing while beat only waits.
NO_BROKER: Final = "messages wait in the outbox"
NO_DATABASE: Final = "beat waits for the database"
NO_WAY: Final = "beat cannot go on"


class ScheduleBeat(Scheduler):
    """Fires what is due in the database. Any number run side by side; what one claims the others pass over.

    Celery's own tick compares all entries for each firing; this one asks the database for the next due row.
    """

    # What the banner shows; --max-interval can only make it shorter.
    max_interval: Any = LONGEST_SLEEP

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._id = f"{socket.gethostname()[:40]}/{uuid.uuid4().hex[:12]}"
        self._declared: tuple[str, ...] | None = None
        self._keeper: Keeper | None = None
        self._away: str | None = None
        self._stamped_at = self._swept_at = -REMOVED_EVERY
        #: Until then what is due gathers: not even a change wakes beat, its own ones look like those of others.
        self._rest_until = 0.0
        #: When something is due, as far as the last tick knew.
        self._expected: datetime | None = None
        self._started_at: datetime | None = None
        self._process: psutil.Process | None = None
        super().__init__(*args, **kwargs)

    # -- what Celery calls

    def setup_schedule(self) -> None:
        """Beat starts: Celery adds its own entry where the result backend needs one. The first tick writes the rows."""
        be_quiet()
        self.install_default_entries(self.app.conf.beat_schedule)

    def update_from_dict(self, dict_: dict[str, Any]) -> None:
        """Celery hands over its own entries here."""
        self.app.conf.beat_schedule = {**self.app.conf.beat_schedule, **dict_}

    @property
    def info(self) -> str:
        """What the banner shows below the scheduler's name."""
        return f"    . db -> {self._at.database.url.render_as_string()}"

    def tick(self, *_args: Any, **_kwargs: Any) -> float:
        """Fire what is due, and sleep until the next is. Never raises: that would end beat."""
        with undisturbed():
            pause = self._outcome()
        rest = max(0.0, self._rest_until - time.monotonic())
        time.sleep(rest)
        # Not by Celery, which would sleep through any change.
        self._waking.sleep(max(0.0, pause - rest))
        return 0.0

    def sync(self) -> None:
        """Nothing is kept in memory that would have to be written."""

    def close(self) -> None:
        """Beat ends in order. Celery calls this in the signal's handler, and once more when beat's loop was left."""
        if self._declared is None:
            return
        keeper, self._keeper, self._declared = self._keeper, None, None
        if keeper is not None:
            keeper.stop()
        self._waking.close()
        try:
            with self._at.database.transaction() as tx:
                processes.leave(tx, self._id)
        except LLMTasksError as error:
            logger.warning("this beat's row stays until it is forgotten: %s", error)

    # -- inside

    @property
    def _at(self) -> Station:
        return station(self.app)

    @cached_property
    def _waking(self) -> Waking:
        return Waking(self._at.database)

    def _outcome(self) -> float:
        """The seconds to sleep after a tick, whatever it met."""
        try:
            return self._tick(self._at)
        except BrokerUnavailableError as error:
            # What was claimed is in the outbox; claiming goes on, and a keeper sends when the broker is back.
            self._say(logging.WARNING, NO_BROKER, error)
            return NO_BROKER_PAUSE
        except DatabaseUnavailableError as error:
            self._say(logging.WARNING, NO_DATABASE, error)
        except LLMTasksError as error:
            self._say(logging.ERROR, NO_WAY, error)
        except Exception:
            logger.exception("a tick failed; beat goes on")
        return AWAY_PAUSE

    def _tick(self, at: Station) -> float:
        if self._keeper is None:
            self._begin(at)
            keeper = self._keeper = Keeper(at)
            try:
                return self._fire(at)
            finally:  # only now: its first round would take the time of the first messages
                keeper.start()
        return self._fire(at)

    def _fire(self, at: Station) -> float:
        self._stamp(at)
        began = time.monotonic()
        claimed = tick.claim_due(at, self._expected)
        # What another beat has locked is asked for again without opening a transaction.
        self._expected = claimed.following if claimed.count else None
        if claimed.messages:
            publish(at, claimed.messages)
        if claimed.cancelled:  # workers would learn of it from the database, later
            sender.revoke(at.app, claimed.cancelled)
        if self._away is not None and (claimed.messages or self._away != NO_BROKER):
            logger.warning("beat works again")
            self._away = None
        if claimed.count >= tick.BATCH:
            return 0.0
        pause = claimed.pause(at.database.now())
        if claimed.count:
            self._rest_until = began + GATHER_TIME
        else:  # due and not claimed: somebody else has the row locked
            pause = max(pause, LOCKED_PAUSE)
        return min(pause, float(self.max_interval))

    def _begin(self, at: Station) -> None:
        """Say what this beat declares, then write it: other beats complete what nobody declares."""
        declared = sync.declared_of(at)
        self._declared = tuple(item.name for item in declared)
        self._stamp(at)
        sync.write(at, declared)
        logger.info("%d schedules are declared in code", len(declared))

    def _stamp(self, at: Station) -> None:
        """Say that this beat lives and what it declares; now and then look for what no beat declares any more."""
        now = time.monotonic()
        if now - self._stamped_at >= at.settings.heartbeat:
            with at.database.transaction() as tx:
                processes.stamp(tx, self._described(at))
            self._stamped_at = now
        if self._keeper is not None and now - self._swept_at >= REMOVED_EVERY:
            self._swept_at = now
            sync.complete_removed(at, self._declared or ())

    def _described(self, at: Station) -> Process:
        if self._process is None:
            import psutil  # only where beat runs

            self._process = psutil.Process()
        now = at.database.now()
        self._started_at = self._started_at or now
        return Process(
            id=self._id,
            app=at.name,
            kind="beat",
            name=f"beat@{socket.gethostname()}",
            pid=os.getpid(),
            pool=None,
            concurrency=None,
            started_at=self._started_at,
            heartbeat_at=now,
            cpu_percent=self._process.cpu_percent(None),
            memory=self._process.memory_info().rss,
            declared=self._declared or (),
            functions=tuple(task_registry.names()),
            clock_offset=(datetime.now(UTC) - now).total_seconds(),
        )

    def _say(self, level: int, sentence: str, error: LLMTasksError) -> None:
        """Say an outage once."""
        if self._away != sentence:
            logger.log(level, "%s: %s", sentence, error)
        self._away = sentence
