"""Migrations: up, down and up again, from many processes at once, and exactly the tables that the code knows."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event, exc, inspect, text

from llmtasks.states import PauseKind, RunState
from llmtasks.store import outbox, overlaps, pauses, rows, runs, schedules, uniqueness
from llmtasks.store.database import Database
from llmtasks.store.pauses import Pause
from llmtasks.uniqueness import Unique, rule_of
from tests.conftest import DATABASES, SERVERS, empty_database, on, parameters
from tests.store.rows_of import APP, NOW, held, new_run, opened, owed, schedule


@pytest.fixture(params=parameters(DATABASES))
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The SQLAlchemy URL of an empty database, of which nothing is used again."""
    yield from empty_database(request, tmp_path)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database that has just been migrated."""
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


def tables(database: Database) -> set[str]:
    with database._open_engine().connect() as connection:
        return set(inspect(connection).get_table_names())


def test_migrated_database_is_what_the_code_knows(database: Database) -> None:
    """Comparing the tables with the database finds nothing to change."""
    with database.reading() as connection:
        options = {"version_table": rows.VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, rows.metadata) == []
    assert database.version() == rows.SCHEMA_VERSION


def test_schema_goes_up_and_down_with_data(database: Database) -> None:
    """Down takes every table of ours with it and nothing else; up again works as at first."""
    opened(database, new_run("a"))
    held(database, "b", function_slots=1)
    with database.transaction() as tx:
        schedules.put(tx, schedule("s"), NOW)
        tx.execute(text("CREATE TABLE of_the_app (id INTEGER)"))

    database.migrate("base")
    assert tables(database) - {rows.VERSION_TABLE} == {"of_the_app"}
    assert database.version() is None

    database.migrate()
    database.migrate()
    assert {table.name for table in rows.metadata.sorted_tables} <= tables(database)
    opened(database, new_run("a"))
    assert owed(database) == {"a": "run"}


def test_revision_can_be_named(database: Database) -> None:
    """The newest by its id is where the database is already."""
    opened(database, new_run("a"))

    database.migrate(rows.SCHEMA_VERSION)

    assert owed(database) == {"a": "run"}


def test_sqlite_migrates_itself_at_first_use(tmp_path: Path) -> None:
    """No command is needed; the file is in WAL mode."""
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")

    opened(database, new_run("a"))

    with database.reading() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 1
    assert database.version() == rows.SCHEMA_VERSION
    database.close()


def _use(url: str, number: int, gate: Any, answers: Any, migrate: bool) -> None:
    database = Database(url)
    gate.wait(120)
    try:
        if migrate:
            database.migrate()
        with database.transaction() as tx:
            runs.open_run(tx, new_run(f"run{number}"), NOW)
        answers.put("")
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")
    database.close()


def _at_once(url: str, count: int, *, migrate: bool) -> list[str]:
    context = multiprocessing.get_context("spawn")
    gate, answers = context.Barrier(count), context.Queue()
    children = [context.Process(target=_use, args=(url, n, gate, answers, migrate)) for n in range(count)]
    for child in children:
        child.start()
    said = [answers.get(timeout=120) for _ in children]
    for child in children:
        child.join(30)
    return said


def test_six_processes_that_start_at_once_share_a_new_file(tmp_path: Path) -> None:
    """Worker, beat and app may meet before the first table exists; none is refused, one migrates."""
    url = f"sqlite:///{tmp_path / 'x.db'}"

    assert _at_once(url, 6, migrate=False) == [""] * 6

    database = Database(url)
    with database.reading() as connection:
        assert len(runs.find(connection, APP)) == 6
    database.close()


@on(*SERVERS)
def test_migrations_at_once_on_a_server_wait_for_each_other(database_url: str) -> None:
    """Several deployments may migrate at the same moment."""
    assert _at_once(database_url, 3, migrate=True) == [""] * 3

    database = Database(database_url)
    with database.transaction() as tx:
        assert len(outbox.take_due(tx, APP, NOW, NOW, 10)) == 3
    database.close()


def test_rows_of_the_first_version_keep_their_meaning(database: Database) -> None:
    """Schedules and runs survive the way up, where they have what was added since, and the way down."""
    database.migrate("base")
    database.migrate("0001")
    named = ("id", "app", "name", "func_name", "kind", "state", "created_at", "next_run_at")
    every = schedule("s", options={"misfire": "all"})
    texts = {"args": "[]", "kwargs": "{}", "options": '{"misfire": "all"}', "every_us": 60_000_000, "anchor": NOW}
    values = {name: getattr(every, name) for name in named} | texts
    values |= {"created_at": NOW, "updated_at": NOW, "handed": False}
    run = {
        name: getattr(new_run("a"), name) for name in ("id", "app", "func_name", "name", "args", "kwargs", "priority")
    }
    run |= {"state": "running", "created_at": NOW, "schedule_id": "s", "scheduled_for": NOW, "delivered": False}
    with database._open_engine().execution_options(write=True).begin() as connection:
        connection.execute(rows.schedules.insert().inline().values(values))
        connection.execute(rows.runs.insert().inline().values(run))

    database.migrate()

    with database.transaction() as tx:
        found = schedules.get(tx, "s")
        assert found is not None
        assert (found.trigger, found.options, found.next_run_at) == (every.trigger, {"misfire": "all"}, NOW)
        assert (found.starts_at, found.fired) == (None, 0)
        assert overlaps.unfinished(tx, ["s"])["s"].run_id == "a"
        kept = runs.get(tx, "a")
        assert kept is not None
        assert kept.backfilled is False

    database.migrate("0001")
    with database._open_engine().connect() as connection:
        assert connection.execute(text("SELECT id FROM llmtasks_schedules")).scalar() == "s"
        assert connection.execute(text("SELECT state FROM llmtasks_runs")).scalar() == "running"
    database.migrate()
    with database.transaction() as tx:
        assert schedules.get(tx, "s") == found


def test_keys_come_and_go_with_data(database: Database) -> None:
    """Before 0005 nobody has a key; its way down leaves runs as they are, its way up begins without keys."""
    rule = rule_of({"unique": True})
    assert rule is not None
    unique = Unique(key="k", rule=rule)
    with database.transaction() as tx:
        assert uniqueness.open_run(tx, new_run("a", unique=unique), NOW).is_new

    database.migrate("0004")

    assert "llmtasks_unique" not in tables(database)
    database.migrate()
    with database.transaction() as tx:
        kept = runs.get(tx, "a")
        assert kept is not None
        assert kept.state is RunState.PENDING
        assert uniqueness.open_run(tx, new_run("b", unique=unique), NOW).is_new
        assert uniqueness.open_run(tx, new_run("c", unique=unique), NOW).run.id == "b"


@on("mariadb")
def test_interrupted_migration_is_repeated(database: Database) -> None:
    """A server that commits each change of a table may keep a part of a migration: the next one begins again."""
    with database.transaction() as tx:
        tx.execute(text(f"DELETE FROM {rows.VERSION_TABLE}"))
        tx.execute(text("ALTER TABLE llmtasks_runs DROP INDEX ix_llmtasks_runs_open"))
        tx.execute(text("DROP TABLE llmtasks_slots"))

    database.migrate()

    test_migrated_database_is_what_the_code_knows(database)


def changes_of(database: Database, target: str, interrupted_after: int = 1_000) -> int:
    """Migrate, and stop with an error after so many changes of tables; returns how many there were."""
    made = 0

    def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal made
        if statement.lstrip().startswith(("CREATE", "ALTER", "DROP")):
            if made == interrupted_after:
                raise InterruptedError
            made += 1

    engine = database._open_engine()
    event.listen(engine, "before_cursor_execute", count)
    try:
        database.migrate(target)
    finally:
        event.remove(engine, "before_cursor_execute", count)
    return made


@on("mariadb")
def test_migration_of_rows_may_be_interrupted_after_every_change(database: Database) -> None:
    """Up from the first version and down to it, with a run that stays as it was."""
    opened(database, new_run("a", schedule_id="s", scheduled_for=NOW))
    down = changes_of(database, "0001")
    up = changes_of(database, "head")
    assert min(down, up) >= 10

    for after in range(max(down, up)):
        with pytest.raises(InterruptedError):
            changes_of(database, "0001", min(after, down - 1))
        changes_of(database, "0001")
        with pytest.raises(InterruptedError):
            changes_of(database, "head", min(after, up - 1))
        database.migrate()

    test_migrated_database_is_what_the_code_knows(database)
    assert owed(database) == {"a": "run"}


@on("mariadb")
def test_interrupted_migration_back_is_repeated(database: Database) -> None:
    """Tables that are gone already are no obstacle."""
    with database.transaction() as tx:
        tx.execute(text("DROP TABLE llmtasks_outbox"))

    database.migrate("base")

    assert tables(database) == {rows.VERSION_TABLE}


@on("mariadb")
def test_migration_drops_no_row(database: Database) -> None:
    """Tables that hold rows are in use, whatever became of the version: the migration fails and says what is there."""
    opened(database, new_run("a"))
    with database.transaction() as tx:
        tx.execute(text(f"DROP TABLE {rows.VERSION_TABLE}"))

    with pytest.raises(exc.DBAPIError, match="'llmtasks_outbox' already exists"):
        database.migrate()

    assert owed(database) == {"a": "run"}


def test_pauses_come_and_go_beside_the_runs(database: Database) -> None:
    """The step to version 0006 and the one back leave runs as they are; the pauses go with their table."""
    opened(database, new_run("a"))
    with database.transaction() as tx:
        pauses.put(tx, APP, Pause(kind=PauseKind.QUEUE, name="q" * 200, paused_at=NOW, reason="x" * 200))

    database.migrate("0005")
    assert "llmtasks_pauses" not in tables(database)
    database.migrate()

    assert owed(database) == {"a": "run"}
    with database.transaction() as tx:
        assert pauses.find(tx, APP) == []
        assert pauses.put(tx, APP, Pause(kind=PauseKind.FUNCTION, name="f", paused_at=NOW)).paused_at == NOW
