"""What only MariaDB does: other errors, other servers of its family, texts and indexes with limits of their own."""

import logging
from pathlib import Path

import pytest
from sqlalchemy import exc, text

from llmtasks.errors import ConfigurationError, DatabaseUnavailableError
from llmtasks.store import rows, runs
from llmtasks.store.database import Database
from llmtasks.store.outages import is_outage
from tests.conftest import on, or_without
from tests.servers import mariadb
from tests.store.rows_of import NOW, new_run, opened, set_run

pytestmark = pytest.mark.mariadb


def read_on(version: str, folder: Path) -> None:
    """Use a database of a server that says it has this version."""
    with or_without(mariadb(folder, version=version)) as server:
        database = Database(server.create_database())
        database.migrate()
        for _ in range(2):
            with database.reading() as connection:
                assert connection.execute(text("SELECT count(*) FROM llmtasks_runs")).scalar() == 0
        database.close()


def test_mysql_is_used_with_a_remark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that calls itself MySQL is not refused; the log says that nobody has tested it, once."""
    with caplog.at_level(logging.WARNING, logger="llmtasks"):
        read_on("5.7.19", tmp_path)

    assert [record.getMessage() for record in caplog.records] == [
        "the database calls itself MySQL 5.7.19: llmtasks is tested with MariaDB only"
    ]


def test_server_that_cannot_skip_locked_rows_is_refused(tmp_path: Path) -> None:
    """The error says which version there is and which one is needed."""
    with pytest.raises(ConfigurationError, match=r"MariaDB 10\.5\.27: expected 10\.6 or newer"):
        read_on("10.5.27-MariaDB", tmp_path)


@pytest.mark.parametrize("scheme", ["mysql", "mariadb", "mysql+pymysql", "mariadb+pymysql"])
def test_every_way_to_write_its_url_leads_to_the_same_driver(scheme: str) -> None:
    """The drivers' names and both names of the database are fine."""
    assert str(Database(f"{scheme}://me@host/x").url) == "mysql+pymysql://me@host/x"


def test_other_drivers_are_refused() -> None:
    """The message names the driver that is used."""
    with pytest.raises(ConfigurationError, match=r"mysql\+mysqldb://me@host/x.*driver is PyMySQL"):
        Database("mysql+mysqldb://me@host/x")


@on("mariadb")
def test_lock_that_is_not_given_in_time_is_an_outage(database: Database) -> None:
    """Waiting too long for a row is an error of ours, after which the same call may work."""
    opened(database, new_run("a"))

    def write() -> None:
        with database.transaction() as tx:
            tx.execute(text("SET SESSION innodb_lock_wait_timeout = 1"))
            tx.execute(rows.runs.update().where(rows.runs.c.id == "a").values(losses=2))

    with database.transaction() as tx:
        tx.execute(rows.runs.update().where(rows.runs.c.id == "a").values(losses=1))
        with pytest.raises(DatabaseUnavailableError, match="Lock wait timeout exceeded"):
            write()

    write()


@on("mariadb")
def test_deadlock_is_an_outage(database: Database) -> None:
    """One of two transactions that wait for each other is undone and told so in our own error."""
    from concurrent.futures import ThreadPoolExecutor

    opened(database, new_run("a"), new_run("b"))

    def lock(connection: object, run_id: str) -> None:
        connection.execute(rows.runs.update().where(rows.runs.c.id == run_id).values(losses=1))  # type: ignore[attr-defined]

    def cross() -> None:
        with database.transaction() as one, ThreadPoolExecutor(1) as pool, database.transaction() as two:
            lock(one, "a")
            lock(two, "b")
            waiting = pool.submit(lock, two, "a")
            try:
                lock(one, "b")
            finally:
                waiting.result(30)

    with pytest.raises(DatabaseUnavailableError, match="Deadlock found"):
        cross()


@on("mariadb")
def test_faults_of_statements_are_no_outages(database: Database) -> None:
    """PyMySQL calls a misspelt column "operational": waiting for it would last for ever."""
    with pytest.raises(exc.OperationalError, match="Unknown column"), database.reading() as connection:
        connection.execute(text("SELECT colour FROM llmtasks_runs"))


@on("mariadb")
def test_nothing_is_cut_to_its_column(database: Database) -> None:
    """Whatever mode the server has by default, a text that is too long is refused."""
    opened(database, new_run("a"))

    with pytest.raises(exc.DataError, match="Data too long for column 'queue'"):
        set_run(database, "a", queue="x" * 201)


def test_errors_without_a_number_are_outages() -> None:
    """A driver that only says that its connection is closed means an outage; our own mistakes do not."""
    import pymysql

    closed = exc.DBAPIError.instance(None, None, pymysql.err.InterfaceError(0, ""), pymysql.err.Error)

    assert is_outage(closed)
    assert not is_outage(exc.ArgumentError("x"))


@on("mariadb")
def test_session_of_the_application_may_call_it_mariadb(database: Database) -> None:
    """What is written in an application's own transaction does not depend on how its URL is written."""
    from sqlalchemy import create_engine

    engine = create_engine(database.url.set(drivername="mariadb+pymysql"))
    with engine.begin() as connection:
        assert connection.dialect.name == "mariadb"
        assert runs.open_run(connection, new_run("a"), NOW)
    engine.dispose()

    with database.reading() as connection:
        run = runs.get(connection, "a")
    assert run is not None
    assert run.created_at == NOW
