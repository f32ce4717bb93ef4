"""The keeper: what keeps runs moving. One thread in every beat and every worker's main process; none leads.

Every step is a short transaction that is safe to repeat, and takes rows that no other keeper has locked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from llmtasks import sender
from llmtasks.dispatch import Station, publish, relay_due
from llmtasks.errors import DatabaseUnavailableError, LLMTasksError
from llmtasks.store import outbox, processes, put_back, rescue, totals
from llmtasks.store.forking import fork_gate

logger = logging.getLogger(__name__)

#: Seconds between two rounds.
PAUSE: Final = 0.5
#: Seconds between two rounds while a server is away.
AWAY_PAUSE: Final = 1.0
#: Seconds between two looks at what lasts long anyway.
SLOW_PAUSE: Final = 10.0
#: Between two rounds a clock that is adjusted gently goes wrong by less than this; more is a step.
STEP: Final = timedelta(seconds=1)
#: No stamp is older.
_NEVER: Final = datetime(1, 1, 2, tzinfo=UTC)


class Keeper:
    """Moves runs that nobody else moves: lost ones, due retries, waiting ones, unpublished messages, untold ends."""

    def __init__(self, at: Station) -> None:
        self._at = at
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._away: str | None = None
        self._slow_at = 0.0
        #: Until then nobody is called lost: owners could not stamp while the database was away, or this host slept.
        self._trust_stamps_at = 0.0
        self._last_round = time.monotonic()
        #: The database's clock and the monotonic one, read together in the last round.
        self._clocks: tuple[datetime, float] | None = None

    def start(self) -> None:
        """Begin, in a thread of its own."""
        self._await_stamps()
        self._thread = threading.Thread(target=self._loop, name="llmtasks-keeper", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End after the step that runs now."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def round(self) -> int:
        """Do everything once; returns how many runs were moved.

        Raises:
            DatabaseUnavailableError: The ledger does not answer.
            BrokerUnavailableError: The broker does not; what was moved stays in the outbox.
        """
        self._notice_gap()
        at, now = self._at, self._at.database.now()
        self._notice_step(now)
        trusted = time.monotonic() >= self._trust_stamps_at
        silent_since = now - at.settings.lease_time if trusted else _NEVER
        # Not only reading: on SQLite this waits as long as owners wait to write their stamps, and so learns of it.
        with at.database.transaction() as tx:
            work = rescue.work(tx, at.name, silent_since, now)
        moved = 0
        if work.lost:
            moved += self._rescue(silent_since, now)
        if work.retries:
            moved += self._moved(rescue.start_retries, now)
        if work.waiting:
            moved += self._moved(rescue.promote, now)
        if work.untold:
            with at.database.transaction() as tx:
                moved += len(rescue.send_ends(tx, at.name, silent_since, now))
        moved += relay_due(at)
        if time.monotonic() - self._slow_at >= SLOW_PAUSE:
            self._slow_at = time.monotonic()
            moved += self._republish()
            with at.database.transaction() as tx:
                processes.forget_silent(tx, at.database.now())
            totals.sum_next_hour(at.database, at.name, at.database.now())
        return moved

    def _loop(self) -> None:
        while not self._stop.is_set():
            pause = PAUSE
            try:
                moved = self.round()
                if self._away is not None:
                    logger.warning("the keeper works again")
                self._away = None
                pause = 0.0 if moved >= rescue.BATCH else PAUSE
            except LLMTasksError as error:
                if isinstance(error, DatabaseUnavailableError):
                    self._await_stamps()
                kind = type(error).__name__
                if self._away != kind:
                    logger.warning("the keeper waits: %s", error)
                self._away = kind
                pause = AWAY_PAUSE
            except Exception:
                logger.exception("a round of the keeper failed; it goes on")
                pause = AWAY_PAUSE
            self._stop.wait(pause)

    def _notice_gap(self) -> None:
        """After a long round (database away, machine asleep) owners get one lease to stamp before any is lost."""
        now = time.monotonic()
        if now - self._last_round > self._at.settings.lease / 2:
            self._trust_stamps_at = now + self._at.settings.lease
        self._last_round = now

    def _notice_step(self, now: datetime) -> None:
        """After a step of the database's clock, or sleep of its host, all stamps are wrong until owners stamp again."""
        at, monotonic = self._at, time.monotonic()
        if self._clocks is None:  # it may have been put back while nobody looked
            with at.database.reading() as connection:
                expected = max(now, put_back.newest(connection, at.name) or now)
        else:
            expected = self._clocks[0] + timedelta(seconds=monotonic - self._clocks[1])
        if abs(now - expected) > STEP:
            self._trust_stamps_at = monotonic + at.settings.lease
        if expected - now > STEP:
            self._obey_put_back_clock(expected, now)
        self._clocks = now, monotonic

    def _obey_put_back_clock(self, before: datetime, now: datetime) -> None:
        """Let nothing wait until the clock shows again what it showed before."""
        at = self._at
        with at.database.transaction() as tx:
            patience = timedelta(seconds=at.settings.outbox_patience)
            put_back.forget_the_lost_time(tx, at.name, before, patience, now)
        after: str | None = ""
        anew = 0
        while after is not None:
            with at.database.transaction() as tx:
                after, begun = put_back.begin_grids_anew(tx, at.name, after, now)
            anew += begun
        seconds = (before - now).total_seconds()
        logger.warning("the clock was put back by %.0f s: %d intervals begin a new grid", seconds, anew)

    def _await_stamps(self) -> None:
        """Whoever lives stamps within a heartbeat of the database's return, which a new keeper may have missed."""
        until = time.monotonic() + self._at.settings.heartbeat + 1
        self._trust_stamps_at = max(self._trust_stamps_at, until)

    def _rescue(self, silent_since: datetime, now: datetime) -> int:
        at = self._at
        failure = sender.lost_failure(at.app)
        with at.database.transaction() as tx:
            lost = rescue.lose_silent(tx, at.name, silent_since, now, failure)
        if lost:
            logger.warning("%d runs lost their worker and are dispatched again", len(lost))
        return len(lost)

    def _moved(self, step: Callable[[Any, str, datetime], list[str]], now: datetime) -> int:
        with self._at.database.transaction() as tx:
            return len(step(tx, self._at.name, now))

    def _republish(self) -> int:
        """Send queued runs again that the broker may have lost: soon if their queue is empty, else ever more seldom."""
        at, now = self._at, self._at.database.now()
        with at.database.reading() as connection:
            queued = rescue.queued_long(connection, at.name, now)
        empty: dict[str, bool] = {}
        again: list[str] = []
        for run_id, func_name, queue, overdue in queued:
            name = sender.queue_of(at.app, func_name, queue)
            if not overdue and name not in empty:
                with fork_gate.entered():
                    empty[name] = sender.queue_length(at.app, name) == 0
            if overdue or empty[name]:
                again.append(run_id)
        if not again:
            return 0
        with at.database.transaction() as tx:
            rescue.republish(tx, at.name, again, now)
            messages = outbox.take_these(tx, again, now + timedelta(seconds=at.settings.outbox_patience))
        publish(at, messages)
        logger.info("%d queued runs were published again", len(messages))
        return len(messages)
