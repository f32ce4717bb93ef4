"""Uniqueness: whatever runs go through, no key has two that may go on, and every end frees it."""

import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llmtasks.errors import DuplicateRunError
from llmtasks.states import ENDED, LIVE, RunState
from llmtasks.store import cancelling, claims, ends, outbox, purging, rescue, rows, runs, uniqueness
from llmtasks.store.claims import Claim
from llmtasks.store.database import Database
from llmtasks.store.ends import End
from llmtasks.uniqueness import Unique, rule_of
from tests.store.rows_of import APP, LEASE, NOW, new_run, offer

KEYS = st.sampled_from(["a", "b"])
POLICIES = st.sampled_from(["return", "replace", "refuse"])
PICK = st.integers(0, 5)
OUTCOMES = st.sampled_from([RunState.SUCCEEDED, RunState.FAILED, RunState.RETRYING, RunState.SKIPPED, RunState.PENDING])


class Uniqueness(RuleBasedStateMachine):
    """People who ask, workers and keepers at a small ledger; the database is real."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="llmtasks-unique-"))
        self.database = Database(f"sqlite:///{self.folder / 'x.db'}")
        self.held: dict[str, Claim] = {}
        self.now = NOW
        #: Every run that was accepted, with its key, oldest first; and the latest of each key.
        self.accepted: dict[str, str] = {}
        self.latest: dict[str, str] = {}

    def _states(self) -> dict[str, Any]:
        with self.database.reading() as connection:
            return {row.id: row for row in connection.execute(rows.runs.select())}

    def _pick(self, number: int) -> str | None:
        """One of the latest runs that the ledger still has."""
        known = [run_id for run_id in self.accepted if run_id in self._states()]
        return known[-1 - number % len(known)] if known else None

    @rule(key=KEYS, policy=POLICIES)
    def ask(self, key: str, policy: str) -> None:
        """Somebody asks: they get a new run exactly where the last one of the key has ended, or is replaced."""
        decided = rule_of({"unique": True, "on_duplicate": policy})
        assert decided is not None
        run_id = f"run{len(self.accepted)}"
        before = self._states().get(self.latest.get(key, ""))
        there = before is not None and before.state in LIVE
        refused = None
        try:
            with self.database.transaction() as tx:
                found = uniqueness.open_run(tx, new_run(run_id, unique=Unique(key=key, rule=decided)), self.now)
        except DuplicateRunError as error:
            refused = error.run_id
        assert refused == (self.latest[key] if there and policy == "refuse" else None)
        if refused is not None:
            return
        assert found.is_new == (not there or policy == "replace")
        if found.is_new:
            assert found.run.id == run_id
            self.accepted[run_id] = key
            self.latest[key] = run_id
        else:
            assert found.run.id == self.latest[key]

    @rule(number=PICK)
    def claim(self, number: int) -> None:
        """A message arrives."""
        run_id = self._pick(number)
        if run_id is None:
            return
        given = offer(run_id, attempts=self._states()[run_id].attempts, max_retries=1)
        with self.database.lone() as lone:
            found = claims.claim_slotless(lone, given, self.now, self.now - LEASE)
        if found is not None and found.state not in ENDED:
            self.held[run_id] = found

    @rule(number=PICK, state=OUTCOMES)
    def end(self, number: int, state: RunState) -> None:
        """An attempt ends, or its run is given to another function, perhaps after it was lost."""
        found = self.held.pop(self._pick(number) or "", None)
        if found is None:
            return
        instead = '{"task": "other"}' if state is RunState.PENDING else None
        how = End(state=state, next_attempt_at=self.now, replacement=instead, delivered=state is RunState.SKIPPED)
        if ends.is_lone(found, how):
            with self.database.lone() as lone:
                ends.end_lone(lone, found, how, self.now)
        else:
            with self.database.transaction() as tx:
                ends.end(tx, found, how, self.now)

    @rule()
    def lose(self) -> None:
        """Time passes without a stamp."""
        self.now += LEASE + timedelta(seconds=1)
        with self.database.transaction() as tx:
            rescue.lose_silent(tx, APP, self.now - LEASE, self.now, "{}")

    @rule(number=PICK)
    def release(self, number: int) -> None:
        """A worker shuts down."""
        with self.database.transaction() as tx:
            rescue.release(tx, "host/one", self._pick(number) or "", self.now)

    @rule(number=PICK)
    def cancel(self, number: int) -> None:
        """Somebody cancels."""
        run_id = self._pick(number)
        if run_id is not None:
            with self.database.transaction() as tx:
                cancelling.cancel(tx, APP, run_id, self.now, "cancelled")

    @rule(number=PICK)
    def expire(self, number: int) -> None:
        """A message comes too late."""
        with self.database.transaction() as tx:
            runs.end_unheld(tx, self._pick(number) or "", self.now, RunState.SKIPPED, "expired before it started")

    @rule()
    def keep(self) -> None:
        """A keeper does its round."""
        with self.database.transaction() as tx:
            rescue.start_retries(tx, APP, self.now)
            messages = outbox.take_due(tx, APP, self.now, self.now + timedelta(seconds=3), 100)
            outbox.published(tx, messages, self.now)

    @rule()
    def purge(self) -> None:
        """Ends are told, and what has ended leaves the ledger."""
        self.now += timedelta(seconds=1)
        with self.database.transaction() as tx:
            tx.execute(rows.runs.update().where(rows.runs.c.state.in_(ENDED)).values(delivered=True, owner=None))
            purging.purge_slice(tx, APP, self.now)

    @invariant()
    def no_key_has_two_runs(self) -> None:
        """Beside the one that was accepted last only those that were asked to stop have not ended."""
        live = {run_id: row for run_id, row in self._states().items() if row.state in LIVE}
        for run_id, row in live.items():
            assert run_id == self.latest[self.accepted[run_id]] or row.cancel_requested_at is not None

    @invariant()
    def keys_name_runs_that_exist(self) -> None:
        """The table of keys holds no more than the ledger."""
        with self.database.reading() as connection:
            named = {row.run_id for row in connection.execute(rows.unique.select())}
        assert named <= set(self._states())

    def teardown(self) -> None:
        self.database.close()
        shutil.rmtree(self.folder)


Uniqueness.TestCase.settings = settings(
    max_examples=15, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestUniqueness = Uniqueness.TestCase
