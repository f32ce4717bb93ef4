"""Slots: no sequence of claims, ends, losses and cancellations exceeds a limit or leaves a place behind."""

import shutil
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llmtasks.states import ENDED, RunState
from llmtasks.store import cancelling, claims, ends, outbox, rescue, rows, runs
from llmtasks.store.claims import Claim, Offer
from llmtasks.store.database import Database
from llmtasks.store.ends import End
from tests.store.rows_of import APP, LEASE, NOW, new_run, offer

FUNCTIONS = {"index": 2, "mail": 1, "free": None}
SCHEDULES: dict[str | None, int | None] = {"s1": 1, "s2": 2, None: None}
RUNS = st.integers(0, 11)


class Slots(RuleBasedStateMachine):
    """Workers, keepers and people at a small ledger; the database is real."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="llmtasks-slots-"))
        self.database = Database(f"sqlite:///{self.folder / 'x.db'}")
        self.held: dict[str, Claim] = {}
        self.now: datetime = NOW

    @initialize()
    def open_runs(self) -> None:
        """A run for every pair of a function and a schedule, with different priorities."""
        with self.database.transaction() as tx:
            for number in range(12):
                func_name, schedule_id = self._limits(number)
                new = new_run(
                    f"run{number}",
                    func_name=func_name,
                    schedule_id=schedule_id,
                    schedule_slots=SCHEDULES[schedule_id],
                    priority=number % 3 + 1,
                )
                assert runs.open_run(tx, new, self.now)

    def _limits(self, number: int) -> tuple[str, str | None]:
        return list(FUNCTIONS)[number % 3], list(SCHEDULES)[number // 3 % 3]

    def _offer(self, number: int, attempts: int) -> Offer:
        func_name, _ = self._limits(number)
        return offer(f"run{number}", func_name=func_name, function_slots=FUNCTIONS[func_name], attempts=attempts)

    def _row(self, run_id: str) -> Any:
        with self.database.reading() as connection:
            return connection.execute(rows.runs.select().where(rows.runs.c.id == run_id)).one()

    @rule(number=RUNS)
    def claim(self, number: int) -> None:
        """A message arrives: the run starts, waits, or is refused."""
        given = self._offer(number, self._row(f"run{number}").attempts)
        with self.database.transaction() as tx:
            found = claims.claim(tx, given, self.now, self.now - LEASE)
            if found is None or found.state in ENDED:
                return
            full = claims.take_slots(tx, APP, given.func_name, found, self.now)
            if full is not None:
                claims.put_aside(tx, found, RunState.WAITING, full, self.now)
        if full is None:
            self.held[found.id] = found

    @rule(number=RUNS, state=st.sampled_from([RunState.SUCCEEDED, RunState.FAILED, RunState.RETRYING]))
    def end(self, number: int, state: RunState) -> None:
        """An attempt ends, perhaps after its run was lost."""
        found = self.held.pop(f"run{number}", None)
        if found is None:
            return
        again = self.now if state is RunState.RETRYING else None
        with self.database.transaction() as tx:
            ends.end(tx, found, End(state=state, next_attempt_at=again), self.now)

    @rule()
    def lose(self) -> None:
        """Time passes without a stamp."""
        self.now += LEASE + timedelta(seconds=1)
        with self.database.transaction() as tx:
            rescue.lose_silent(tx, APP, self.now - LEASE, self.now, "{}")

    @rule(number=RUNS)
    def release(self, number: int) -> None:
        """A worker shuts down."""
        with self.database.transaction() as tx:
            rescue.release(tx, "host/one", f"run{number}", self.now)

    @rule(number=RUNS)
    def cancel(self, number: int) -> None:
        """Somebody cancels."""
        with self.database.transaction() as tx:
            cancelling.cancel(tx, APP, f"run{number}", self.now, "cancelled")

    @rule()
    def keep(self) -> None:
        """A keeper does its round."""
        with self.database.transaction() as tx:
            rescue.start_retries(tx, APP, self.now)
            rescue.promote(tx, APP, self.now)
            messages = outbox.take_due(tx, APP, self.now, self.now + timedelta(seconds=3), 100)
            outbox.published(tx, messages, self.now)

    @invariant()
    def running_runs_have_their_places_and_nobody_has_another(self) -> None:
        """Every running run has one place in each of its scopes; others have none, save those that were handed one."""
        with self.database.reading() as connection:
            slots = connection.execute(rows.slots.select()).all()
            known = {row.id: row for row in connection.execute(rows.runs.select())}
        by_run: dict[str, set[str]] = {}
        for slot in slots:
            assert slot.scope not in by_run.setdefault(slot.run_id, set()), "two places of one scope"
            by_run[slot.run_id].add(slot.scope)
            kind, _, rest = slot.scope.partition(":")
            limit = SCHEDULES[rest] if kind == "schedule" else FUNCTIONS[rest.partition(":")[2]]
            assert limit is not None
            assert 0 <= slot.place < limit
        for run_id, row in known.items():
            func_name, schedule_id = self._limits(int(run_id.removeprefix("run")))
            wanted = {f"function:{APP}:{func_name}"} if FUNCTIONS[func_name] else set()
            wanted |= {f"schedule:{schedule_id}"} if SCHEDULES[schedule_id] else set()
            held = by_run.get(run_id, set())
            if row.state == RunState.RUNNING:
                assert held == wanted
            elif row.state in {RunState.PENDING, RunState.QUEUED}:
                assert held in (set(), wanted)
            else:
                assert held == set(), (run_id, row.state)

    def teardown(self) -> None:
        """Whatever happened, keepers and workers bring every run to an end, and every place is free then."""
        for _ in range(60):
            self.lose()
            self.keep()
            for number in range(12):
                self.claim(number)
            for run_id in list(self.held):
                self.end(int(run_id.removeprefix("run")), RunState.SUCCEEDED)
            with self.database.reading() as connection:
                states = {row.state for row in connection.execute(rows.runs.select())}
                left = connection.execute(rows.slots.select()).all()
            if states <= ENDED:
                break
        self.database.close()
        shutil.rmtree(self.folder)
        assert states <= ENDED
        assert left == []


TestSlots = Slots.TestCase
TestSlots.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
