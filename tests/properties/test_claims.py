"""Claims: whatever order messages, ends, losses and deliveries come in, one owner at most writes, and ends stay."""

import shutil
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from llmtasks.states import ENDED, FOLLOWS, RunState
from llmtasks.store import cancelling, claims, ends, held, rescue, rows
from llmtasks.store.claims import Claim
from llmtasks.store.database import Database
from llmtasks.store.ends import End
from llmtasks.store.held import Delivered
from tests.conftest import on
from tests.store.rows_of import APP, LEASE, NOW, offer

OWNERS = st.sampled_from(["host/1", "host/2", "host/3"])
ENDS = st.sampled_from([RunState.SUCCEEDED, RunState.FAILED, RunState.RETRYING, RunState.QUEUED])
MAX_RETRIES = 3


class OneRun(RuleBasedStateMachine):
    """Three workers and a keeper around one run; each worker remembers the claims it had, lost ones too."""

    def __init__(self, url: str = "") -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="llmtasks-claims-"))
        self.database = Database(url or f"sqlite:///{self.folder / 'x.db'}")
        self.now: datetime = NOW
        self.claims: list[tuple[str, Claim]] = []
        self.before: Any = None

    @property
    def row(self) -> Any:
        with self.database.reading() as connection:
            return connection.execute(rows.runs.select()).one_or_none()

    @rule(owner=OWNERS, attempts=st.integers(0, 5))
    def claim(self, owner: str, attempts: int) -> None:
        """A copy of some message arrives; only the right one at the right time gets the run."""
        before = self.row
        with self.database.transaction() as tx:
            given = offer("a", owner=owner, attempts=attempts, max_retries=MAX_RETRIES)
            found = claims.claim(tx, given, self.now, self.now - LEASE)
        if found is None:
            assert before is not None
            assert self.row == before, "a refused claim changes nothing"
            return
        assert found.claim_no == (before.claim_no if before else 0) + 1
        if before is not None and before.state in ENDED:
            assert found.state == before.state
            assert not before.delivered
            assert before.owner is None or before.heartbeat_at < self.now - LEASE
        elif before is not None:
            assert before.state in {RunState.PENDING, RunState.QUEUED}
            assert attempts >= before.attempts
        self.claims.append((owner, found))

    @rule(index=st.integers(0, 20), state=ENDS, keeps=st.booleans())
    def end(self, index: int, state: RunState, keeps: bool) -> None:
        """Some claim, perhaps lost long ago, ends its attempt."""
        if not self.claims:
            return
        _, found = self.claims[index % len(self.claims)]
        before = self.row
        again = self.now + timedelta(seconds=5) if state is RunState.RETRYING else None
        counts = state is not RunState.QUEUED
        with self.database.transaction() as tx:
            how = End(state=state, counts=counts, keeps_owner=keeps and state in ENDED, next_attempt_at=again)
            ours, _ = ends.end(tx, found, how, self.now)
        assert ours == (before.claim_no == found.claim_no and before.state == RunState.RUNNING)
        if not ours:
            assert self.row == before, "a late owner changes nothing"
        else:
            assert self.row.attempts == before.attempts + counts

    @rule(index=st.integers(0, 20))
    def deliver(self, index: int) -> None:
        """Some claim says that Celery was told."""
        if not self.claims:
            return
        _, found = self.claims[index % len(self.claims)]
        before = self.row
        with self.database.transaction() as tx:
            held.mark_delivered(tx, [Delivered(run_id="a", claim=found.claim_no, keep=100)])
        ours = before.claim_no == found.claim_no and before.state in ENDED
        assert self.row.delivered == (before.delivered or ours)

    @rule(owner=OWNERS)
    def stamp(self, owner: str) -> None:
        """A worker's heart beats; it learns whether the run is its own."""
        with self.database.transaction() as tx:
            ours = held.stamp(tx, owner, ["a"], self.now)
        row = self.row
        assert ours == ({"a": row.claim_no} if row is not None and row.owner == owner else {})

    @rule(seconds=st.integers(1, 14))
    def keep(self, seconds: int) -> None:
        """Time passes, and a keeper does its round."""
        self.now += timedelta(seconds=seconds)
        before = self.row
        with self.database.transaction() as tx:
            lost = rescue.lose_silent(tx, APP, self.now - LEASE, self.now, "{}")
            rescue.start_retries(tx, APP, self.now)
            rescue.send_ends(tx, APP, self.now - LEASE, self.now)
        if lost:
            assert before.state == RunState.RUNNING
            assert before.heartbeat_at < self.now - LEASE

    @rule()
    def cancel(self) -> None:
        """Somebody cancels it."""
        if self.row is not None:
            with self.database.transaction() as tx:
                cancelling.cancel(tx, APP, "a", self.now, "cancelled")

    @invariant()
    def history_goes_forward(self) -> None:
        """Counts never fall, an end is final, what follows may follow, and only a held run has an owner."""
        row, before = self.row, self.before
        self.before = row
        if row is None:
            return
        if row.owner is not None:
            assert row.state == RunState.RUNNING or row.state in ENDED
        if row.state == RunState.RUNNING:
            assert row.owner is not None
            assert not row.delivered
        assert row.attempts <= 6 + MAX_RETRIES + row.claim_no
        if row.losses and row.state == RunState.FAILED and row.error and "WorkerLost" in row.error:
            assert row.attempts > MAX_RETRIES
        if before is None:
            return
        assert row.claim_no >= before.claim_no
        assert row.attempts >= before.attempts
        assert row.delivered >= before.delivered
        if before.state in ENDED:
            assert row.state == before.state
            assert row.attempts == before.attempts
        if before.delivered:
            assert row == before
        if row.state != before.state:
            assert _follows(before.state, row.state) or any(
                _follows(before.state, step) and _follows(step, row.state) for step in RunState
            )

    def teardown(self) -> None:
        """Nothing of the example stays."""
        with self.database.transaction() as tx:
            for table in rows.metadata.sorted_tables:
                tx.execute(table.delete())
        self.database.close()
        shutil.rmtree(self.folder)


def _follows(before: str, after: str) -> bool:
    return RunState(before) in FOLLOWS[RunState(after)]


TestOneRun = OneRun.TestCase
TestOneRun.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@on("mariadb")
def test_one_run_where_a_claim_takes_several_statements(database_url: str) -> None:
    """The same holds on MariaDB."""
    database = Database(database_url)
    database.migrate()
    database.close()

    run_state_machine_as_test(
        lambda: OneRun(database_url),
        settings=settings(
            max_examples=8, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
