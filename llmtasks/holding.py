"""What this process holds, and the heart that stamps it: one thread, started with the first run that is held.

It stamps the held runs and learns which are no longer its own, looks for cancel requests, and writes down which
ends were delivered (late, in groups: losing that mark costs one harmless replay).
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from llmtasks.bridge import Body, NotYours, in_thread
from llmtasks.dispatch import Station, relay
from llmtasks.errors import DatabaseUnavailableError, LLMTasksError, SchemaOutdatedError
from llmtasks.owner import in_pool_child, owner_of
from llmtasks.states import RunState
from llmtasks.store import ends, held
from llmtasks.store.claims import Claim
from llmtasks.store.ends import End
from llmtasks.store.held import Delivered

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: The longest wait between two tries to reach the ledger.
LEDGER_PAUSE: Final = 1.0


class Cancelled(asyncio.CancelledError):
    """Somebody cancelled the run; raised inside the coroutine."""


@dataclass(eq=False, slots=True)
class Hold:
    """A run that this process holds until its end is delivered."""

    station: Station
    claim: Claim
    body: Body
    #: Arguments as JSON, to be cut and redacted once they are not needed any more.
    args: str
    kwargs: str
    #: The function runs now; its end is not in the ledger.
    calling: bool = False
    lost: bool = False
    #: How the attempt ended, once that is in the ledger.
    ended: RunState | None = None
    cpu_seconds: float | None = None
    peak_memory: int | None = None


def hold_of(request: Any) -> Hold | None:
    """What this process holds for a request of Celery's; None outside an attempt of ours."""
    return getattr(request, "llm_hold", None)


def persist(write: Callable[[], T]) -> T:
    """Do a write that must not be given up: an outage of the database delays it, and is said once."""
    return in_thread(lambda: _persist(write))


def _persist(write: Callable[[], T]) -> T:
    pause, said = 0.05, False
    while True:
        try:
            found = write()
        except (DatabaseUnavailableError, SchemaOutdatedError) as error:
            if not said:
                logger.warning("waiting for the ledger: %s", error)
            said = True
            time.sleep(pause)
            pause = min(LEDGER_PAUSE, pause * 2)
        else:
            return found


class Holdings:
    """The runs that this process holds."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)
        atexit.register(self.flush)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._held: dict[str, Hold] = {}
        #: Runs of functions whose ledger is off: nothing stamps them.
        self._lent: dict[str, Body] = {}
        self._delivered: list[tuple[Station, Delivered]] = []
        self._thread: threading.Thread | None = None

    def hold(self, hold: Hold) -> None:
        """Stamp a run from now on."""
        with self._lock:
            self._held[hold.claim.id] = hold
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="llmtasks-heart", daemon=True)
                self._thread.start()

    def release(self, hold: Hold) -> bool:
        """Stamp a run no longer; says whether it was held."""
        with self._lock:
            if self._held.get(hold.claim.id) is not hold:
                return False
            del self._held[hold.claim.id]
            return True

    def deliver(self, hold: Hold, told: Delivered) -> None:
        """The end of a held run reached Celery."""
        with self._lock:
            if self.release(hold):
                self._delivered.append((hold.station, told))

    def interrupt(self, run_id: str, error: asyncio.CancelledError) -> None:
        """Raise ``error`` inside the coroutine of a held run, if it runs."""
        with self._lock:
            hold = self._held.get(run_id)
            body = self._lent.get(run_id) if hold is None else hold.body if hold.calling else None
            if body is not None:
                body.interrupt(error)

    def lend(self, run_id: str, body: Body) -> None:
        """A function whose ledger is off begins: until it is taken back, its run can be interrupted."""
        self._lent[run_id] = body

    def take_back(self, run_id: str, body: Body) -> None:
        """It has ended."""
        if self._lent.get(run_id) is body:
            del self._lent[run_id]

    @property
    def calls(self) -> bool:
        """Whether a function runs in this process."""
        with self._lock:
            return bool(self._lent) or any(hold.calling for hold in self._held.values())

    def set_calling(self, hold: Hold, calling: bool) -> None:
        """The function of a held run begins or has ended.

        Raises:
            NotYours: The run was given up before its function began.
        """
        with self._lock:
            if calling and hold.lost:
                raise NotYours("the run was given up before it began")
            hold.calling = calling

    def give_up(self, why: str, patience: float) -> list[Hold]:
        """Stop what runs in this process; from now on its ends count for nothing.

        Args:
            why: What coroutines are told.
            patience: Seconds that coroutines get to tidy up.

        Returns:
            The runs that were held. Those that still are ``calling`` did not stop.
        """
        with self._lock:
            held_now = [hold for hold in self._held.values() if not hold.lost]
            for hold in held_now:
                hold.lost = True
            stopping = [hold for hold in held_now if hold.calling and hold.body.interrupt(NotYours(why))]
            lent = {run_id for run_id, body in list(self._lent.items()) if body.interrupt(NotYours(why))}
        deadline = time.monotonic() + patience
        while (any(hold.calling for hold in stopping) or lent & {*self._lent}) and time.monotonic() < deadline:
            time.sleep(0.01)
        return held_now

    def flush(self) -> None:
        """Write down which ends were delivered."""
        with self._lock:
            ends, self._delivered = self._delivered, []
        try:
            for station in {station for station, _ in ends}:
                with station.database.transaction() as tx:
                    held.mark_delivered(tx, [told for at, told in ends if at is station])
        except BaseException:
            with self._lock:
                self._delivered = ends + self._delivered
            raise

    def _beat(self) -> None:
        """The heart's loop; it outlives any outage of the database and says so once."""
        stamped = time.monotonic()
        away = False
        while True:
            with self._lock:
                stations = {hold.station for hold in self._held.values()}
            patience = min((at.settings.cancel_poll for at in stations), default=0.5)
            time.sleep(patience)
            self._tell_overdue()
            try:
                due = {at for at in stations if time.monotonic() - stamped >= at.settings.heartbeat}
                if due:
                    stamped = time.monotonic()
                for at in due:
                    self._stamp(at)
                for at in stations:
                    self._obey(at)
                self.flush()  # last: one row that cannot be marked must not stop the stamps
                if away:
                    logger.warning("the ledger answers again; held runs are stamped")
                away = False
            except LLMTasksError as error:
                if not away:
                    logger.warning("held runs cannot be stamped, they go on: %s", error)
                away = True
            except Exception:
                logger.exception("the heartbeat failed and goes on")

    def _tell_overdue(self) -> None:
        """Signal a passed soft limit again: the pool's own signal may have come before the function ran."""
        with self._lock:
            overdue = any(hold.calling and hold.body.is_overdue() for hold in self._held.values())
            if overdue and in_pool_child():
                os.kill(os.getpid(), signal.SIGUSR1)

    def _stamp(self, at: Station) -> None:
        """Stamp what is held; stop what is no longer ours."""
        with self._lock:
            mine = [hold for hold in self._held.values() if hold.station is at and not hold.lost]
        with at.database.transaction() as tx:
            ours = held.stamp(tx, owner_of(), [hold.claim.id for hold in mine], at.database.now())
        for hold in mine:
            if ours.get(hold.claim.id) == hold.claim.claim_no:
                continue
            with self._lock:
                if not hold.calling or self._held.get(hold.claim.id) is not hold:
                    continue
                if hold.body.is_starting():
                    continue  # the next look finds its coroutine
                hold.lost = True
                logger.error(
                    "run %s was given to another worker; this attempt stops and counts for nothing", hold.claim.id
                )
                if not hold.body.interrupt(NotYours("the run was given to another worker")) and in_pool_child():
                    self._end_process()

    def _obey(self, at: Station) -> None:
        """Cancel the runs of which somebody asked it."""
        with at.database.reading() as connection:
            wanted = held.cancel_requests(connection, at.name, owner_of())
        for run_id, (claim_no, reason) in wanted.items():
            with self._lock:
                hold = self._held.get(run_id)
                if hold is None or hold.claim.claim_no != claim_no or not hold.calling:
                    continue
                if hold.body.is_starting():
                    continue  # the next look finds its coroutine
                if not hold.body.interrupt(Cancelled(reason)) and in_pool_child():
                    self._cancel_by_force(hold, reason)

    def _cancel_by_force(self, hold: Hold, reason: str) -> None:
        """End a sync body, and this child with it: nothing else stops a function that does not await.

        Done in the child itself and under the lock that the function's end takes too, so that no other run is hit.
        """
        how = End(state=RunState.CANCELLED, reason=reason)
        with hold.station.database.transaction() as tx:
            ended, handed = ends.end(tx, hold.claim, how, hold.station.database.now())
        if ended:
            relay(hold.station, handed)
            logger.warning("run %s is cancelled: its process ends, the pool starts another", hold.claim.id)
            self._end_process()

    def _end_process(self) -> None:
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)


holdings: Final = Holdings()
