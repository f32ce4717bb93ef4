"""Database: what a transaction promises, whose clock it is, what an outage looks like."""

import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import exc, insert, select, text

from llmtasks.errors import ConfigurationError, DatabaseUnavailableError, SchemaOutdatedError
from llmtasks.states import RunState
from llmtasks.store import rows, runs
from llmtasks.store.database import Database, database_at
from llmtasks.store.pinging import IDLE
from tests.conftest import SERVERS, on
from tests.servers import DatabaseServer
from tests.store.rows_of import APP, NOW, all_at_once, later, new_run, opened, state_of
from tests.waiting import wait_until

# -- instants


def test_naive_instants_are_refused(database: Database) -> None:
    """A naive datetime is an error before it reaches the database."""
    with database.transaction() as tx, pytest.raises(ValueError, match="naive datetime"):
        runs.open_run(tx, new_run("a", scheduled_for=datetime(2026, 1, 1)), NOW)


def test_instants_come_back_as_utc(database: Database) -> None:
    """Whatever zone they are written in, they are the same instant, in UTC, to the microsecond."""
    tokyo = datetime(2026, 1, 1, 9, 0, 0, 123456, tzinfo=timezone(timedelta(hours=9)))
    opened(database, new_run("a", schedule_id="s", scheduled_for=tokyo))

    with database.reading() as connection:
        run = runs.get(connection, "a")

    assert run is not None
    assert run.scheduled_for == tokyo
    assert run.scheduled_for is not None
    assert run.scheduled_for.tzinfo is UTC


# -- transactions


def test_left_transaction_is_committed(database: Database) -> None:
    """Other connections see it when the block is left, and not before."""
    with database.transaction() as tx:
        runs.open_run(tx, new_run("a"), NOW)
        with database.reading() as connection:
            assert runs.get(connection, "a") is None

    assert state_of(database, "a") is RunState.PENDING


def test_raising_transaction_is_rolled_back(database: Database) -> None:
    """Nothing of it stays, and the error is the caller's own."""

    def fail() -> None:
        with database.transaction() as tx:
            runs.open_run(tx, new_run("a"), NOW)
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()

    with database.reading() as connection:
        assert runs.get(connection, "a") is None


def test_broken_statement_is_not_an_outage(database: Database) -> None:
    """An error of ours is not called an absent database."""
    row = {"id": "a", "app": APP}

    with pytest.raises(exc.DatabaseError), database.transaction() as tx:
        tx.execute(insert(rows.runs), row)


def test_reader_is_not_kept_waiting_by_a_writer(database: Database) -> None:
    """A long write transaction delays nobody who reads."""
    opened(database, new_run("a"))

    with database.transaction() as tx:
        tx.execute(rows.runs.update().values(state="queued"))
        assert state_of(database, "a") is RunState.PENDING


def test_writers_at_once_wait_for_each_other(database: Database) -> None:
    """Read, then write, in many threads at once: none fails, and no update is lost."""
    opened(database, new_run("a"))

    def add(_: int) -> None:
        for _ in range(10):
            with database.transaction() as tx:
                query = select(rows.runs.c.losses).where(rows.runs.c.id == "a").with_for_update()
                losses = tx.execute(query).scalar_one()
                tx.execute(rows.runs.update().where(rows.runs.c.id == "a").values(losses=losses + 1))

    all_at_once(add, range(5))

    with database.reading() as connection:
        assert connection.execute(select(rows.runs.c.losses)).scalar_one() == 50


def test_closed_database_opens_again(database: Database) -> None:
    """Closing gives back connections; the next use needs no other object."""
    opened(database, new_run("a"))

    database.close()

    assert state_of(database, "a") is RunState.PENDING


def test_process_has_one_database_for_a_url(database_url: str) -> None:
    """Nothing is opened by asking for it."""
    first = database_at(database_url)

    assert first is database_at(database_url)
    assert first._engine is None


# -- URLs


def test_other_databases_are_refused() -> None:
    """The message hides the password and says what to set."""
    with pytest.raises(
        ConfigurationError, match=r"oracle://me:\*\*\*@host/x.*expected a sqlite://, postgresql:// or mysql://"
    ):
        Database("oracle://me:secret@host/x")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_database_in_memory_is_refused(url: str) -> None:
    """Worker, beat and app would each have one of their own."""
    with pytest.raises(ConfigurationError, match="expected a file"):
        Database(url)


def test_directory_of_a_new_file_is_made(tmp_path: Path) -> None:
    """The data directory need not exist before the first use."""
    database = Database(f"sqlite:///{tmp_path / 'deep' / 'down' / 'x.db'}")

    with database.reading():
        pass

    database.close()
    assert (tmp_path / "deep" / "down" / "x.db").exists()


def test_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    """The error names the file; waiting would not help, so it is no outage."""
    path = tmp_path / "x.db"
    path.write_text("this is no database" * 100)
    database = Database(f"sqlite:///{path}")

    with pytest.raises(ConfigurationError, match=r"x\.db.*is not a SQLite file"), database.reading():
        pass
    database.close()


# -- the clock


def test_clock_of_sqlite_is_the_hosts(tmp_path: Path) -> None:
    """No connection is opened for it."""
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")

    before = datetime.now(UTC)
    assert before <= database.now() <= datetime.now(UTC)
    assert database._engine is None


@on(*SERVERS)
def test_clock_of_a_server_is_the_servers(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose wall clock is wrong compares with the same instants as all the others."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            raise AssertionError("the host's wall clock was asked")

    monkeypatch.setattr("llmtasks.store.database.datetime", Wrong)
    ours = database.now()
    with database.reading() as connection:
        # Seconds since 1970: no zone of a connection touches them.
        epoch = {"postgresql": "extract(epoch from clock_timestamp())", "mysql": "unix_timestamp(now(6))"}
        seconds = connection.execute(text(f"SELECT {epoch[connection.dialect.name]}")).scalar_one()
    theirs = datetime.fromtimestamp(float(seconds), UTC)

    assert abs(theirs - ours) < timedelta(seconds=2)
    assert ours.tzinfo is UTC
    first, second = database.now(), database.now()
    assert first <= second


# -- outages


def test_stopped_server_is_unavailable_until_it_returns(own_server: DatabaseServer) -> None:
    """Every call says so in our own error, quickly; the clock goes on; with the server everything works again."""
    database = Database(own_server.create_database())
    database.migrate()
    opened(database, new_run("a"))
    database.now()

    own_server.stop()
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(DatabaseUnavailableError, match="does not answer"), database.transaction() as tx:
            tx.execute(text("SELECT 1"))
        with pytest.raises(DatabaseUnavailableError, match="does not answer"), database.reading() as tx:
            tx.execute(text("SELECT 1"))
    assert time.monotonic() - started < 15
    database._measured = -1e9
    assert abs(database.now() - datetime.now(UTC)) < timedelta(seconds=5)
    with pytest.raises(DatabaseUnavailableError):
        Database(str(database.url)).now()

    own_server.start()
    wait_until(lambda: _answers(database), 30, "the database to answer")
    assert state_of(database, "a") is RunState.PENDING
    database.close()


def test_connection_that_breaks_in_a_transaction_is_an_outage(own_server: DatabaseServer) -> None:
    """What was written is rolled back, and the next transaction has another connection."""
    database = Database(own_server.create_database())
    database.migrate()

    def write() -> None:
        with database.transaction() as tx:
            runs.open_run(tx, new_run("a"), NOW)
            own_server.kill()
            runs.get(tx, "a")

    with pytest.raises(DatabaseUnavailableError):
        write()

    own_server.start()
    wait_until(lambda: _answers(database), 30, "the database to answer")
    with database.reading() as connection:
        assert runs.get(connection, "a") is None
    database.close()


def test_connection_that_was_cut_while_it_lay_idle_is_replaced(database_server: DatabaseServer) -> None:
    """A server that was restarted in the night costs the first transaction of the morning nothing."""
    url = database_server.create_database()
    database = Database(url)
    database.migrate()
    opened(database, new_run("a"))

    database_server.cut(url)
    with pytest.raises(DatabaseUnavailableError), database.reading() as tx:
        tx.execute(text("SELECT 1"))  # used a moment ago, so nobody asked
    opened(database, new_run("b"))
    database_server.cut(url)
    cut = time.monotonic()
    wait_until(lambda: time.monotonic() - cut > IDLE, 10, "the connection to lie idle")

    assert state_of(database, "b") is RunState.PENDING
    database.close()
    database_server.drop_database(url)


def _answers(database: Database) -> bool:
    try:
        with database.reading():
            return True
    except DatabaseUnavailableError:
        return False


def test_locked_file_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that waits too long for another one is told so in our own error."""
    monkeypatch.setattr("llmtasks.store.engines.SQLITE_BUSY_TIMEOUT", 0.1)
    first, second = (Database(f"sqlite:///{tmp_path / 'x.db'}") for _ in range(2))

    with (
        first.transaction() as tx,
        pytest.raises(DatabaseUnavailableError, match="database is locked"),
        second.transaction(),
    ):
        runs.open_run(tx, new_run("a"), later(1))

    first.close()
    second.close()


# -- the schema


def test_server_without_tables_is_said_with_the_command(database_server: DatabaseServer) -> None:
    """A server is migrated by hand; the error says how, and the same object works afterwards."""
    url = database_server.create_database()
    database = Database(url)

    for open_it in (database.transaction, database.reading):
        with pytest.raises(SchemaOutdatedError, match=r"version none, .* needs 0006: run `celery llmtasks migrate`"):
            open_it().__enter__()
    assert database.version() is None

    database.migrate()
    assert database.version() == rows.SCHEMA_VERSION
    with database.transaction():
        pass
    database.close()
    database_server.drop_database(url)


def test_write_lock_is_taken_soon_after_it_is_free(tmp_path: Path) -> None:
    """Who has waited long does not look more seldom: SQLite's own wait would sleep from 228 ms to 328."""
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")
    freed_at = 0.0

    def hold() -> None:
        nonlocal freed_at
        with database.transaction():
            held.set()
            time.sleep(0.25)
            freed_at = time.monotonic()

    late: list[float] = []
    for _ in range(7):
        held = threading.Event()
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        with database.transaction():
            late.append(time.monotonic() - freed_at)
        holder.join()

    assert sorted(late)[3] < 0.025
    database.close()
