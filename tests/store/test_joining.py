"""Joining: a Task that is saved in the application's own transaction shares its fate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from llmtasks import Task, task_registry
from llmtasks.errors import ConfigurationError, TaskNotFoundError
from llmtasks.store.database import Database, database_at
from llmtasks.store.joining import joined
from tests.conftest import on

FUNCTION = "tests.joining.sync_emails"

registered: list[Any] = []


def sync_emails(folder: str = "INBOX") -> str:
    return folder


@pytest.fixture
def app(database: Database, database_url: str) -> Iterator[celery.Celery]:
    """A Celery app whose Tasks are in the test's database, and a function to schedule."""
    before = celery._state._get_current_app()  # type: ignore[attr-defined]
    app = celery.Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(llmtasks_database_url=database_url, llmtasks_broker_url="memory://")
    app.set_current()
    if not registered:  # Celery remembers a shared task for ever, and warns of a second one
        task_registry.register(name=FUNCTION)(sync_emails)
        registered.append((task_registry._functions[FUNCTION], task_registry._options[FUNCTION]))
    task_registry._functions[FUNCTION], task_registry._options[FUNCTION] = registered[0]
    yield app
    del task_registry._functions[FUNCTION], task_registry._options[FUNCTION]
    before.set_current()
    app.close()
    database_at(database_url).close()


def new_task() -> Task:
    return Task(func_name=FUNCTION, name="mine", interval_minutes=5)


def exists(task: Task) -> bool:
    assert task.id is not None
    try:
        Task.get_sync(task.id)
    except TaskNotFoundError:
        return False
    return True


def test_committed_session_makes_the_task_exist(app: celery.Celery, database_url: str) -> None:
    """Before the commit nobody else sees it; after it everybody does."""
    engine = create_engine(database_url)
    with Session(engine) as session:
        task = new_task().save_sync(session=session)
        assert not exists(task)
        session.commit()
    engine.dispose()

    assert exists(task)


def test_rolled_back_session_undoes_the_task(app: celery.Celery, database_url: str) -> None:
    """It never existed, and what the application wrote beside it neither."""
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (id INTEGER)"))
    with Session(engine) as session:
        session.execute(text("INSERT INTO orders VALUES (1)"))
        task = new_task().save_sync(session=session)
        session.rollback()

    assert not exists(task)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM orders")).scalar() == 0
    engine.dispose()


def test_change_in_a_session_is_undone_with_it(app: celery.Celery, database_url: str) -> None:
    """A second save joins as the first does."""
    task = new_task().save_sync()
    engine = create_engine(database_url)
    with Session(engine) as session:
        task.name = "other"
        task.save_sync(session=session)
        session.rollback()
    engine.dispose()

    assert task.id is not None
    assert Task.get_sync(task.id).name == "mine"


def test_session_on_a_connection_joins_too(app: celery.Celery, database_url: str) -> None:
    """A session that is bound to a connection, as in tests of applications, is on that connection's database."""
    engine = create_engine(database_url)
    with engine.connect() as connection, connection.begin() as transaction:
        with Session(connection) as session:
            task = new_task().save_sync(session=session)
        transaction.rollback()
    engine.dispose()

    assert not exists(task)


@on("sqlite", "postgresql")  # PyMySQL is not async
async def test_async_session_joins(app: celery.Celery, database_url: str) -> None:
    """Commit and rollback of an AsyncSession decide as those of a Session do."""
    engine = create_async_engine(database_url.replace("sqlite://", "sqlite+aiosqlite://"))
    async with AsyncSession(engine) as session:
        gone = await new_task().save(session=session)
        await session.rollback()
        kept = await new_task().save(session=session)
        await session.commit()
    await engine.dispose()

    assert not exists(gone)
    assert exists(kept)


async def test_session_on_another_database_is_refused(app: celery.Celery, database_url: str, tmp_path: Path) -> None:
    """The error names both databases; nothing is written to either."""
    url = f"sqlite:///{tmp_path / 'orders.db'}"
    engine, async_engine = create_engine(url), create_async_engine(url.replace("sqlite://", "sqlite+aiosqlite://"))

    with Session(engine) as session, pytest.raises(ConfigurationError, match=r"orders\.db.*llmtasks keeps its tables"):
        new_task().save_sync(session=session)
    async with AsyncSession(async_engine) as session:
        with pytest.raises(ConfigurationError, match="orders"):
            await new_task().save(session=session)

    engine.dispose()
    await async_engine.dispose()
    assert Task.list_sync() == []


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("postgresql+psycopg://me@localhost/x", "postgresql://you:pw@127.0.0.1:5432/x"),
        ("postgresql://me@db.example/x", "postgresql+asyncpg://me@db.example:5432/x"),
        ("postgresql:///x?host=/run/pg", "postgresql+psycopg://me@/x?host=/run/pg"),
        ("mysql+pymysql://me@localhost/x", "mariadb+mariadbconnector://you:pw@127.0.0.1:3306/x"),
        ("mysql+pymysql:///x?unix_socket=/run/db", "mysql://me@localhost/x?unix_socket=/run/db"),
    ],
)
def test_same_server_is_recognised_however_it_is_written(ours: str, theirs: str) -> None:
    """Driver, user, password, a default port and the name of this host make no other database."""
    from sqlalchemy import make_url

    from llmtasks.store.joining import _place

    assert _place(make_url(ours)) == _place(make_url(theirs))


def test_first_use_may_be_inside_a_session(tmp_path: Path) -> None:
    """The tables exist before the caller's transaction relies on them."""
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")
    engine: Any = create_engine(str(database.url))
    with Session(engine) as session:
        connection = joined(database, session)
        assert connection.execute(text("SELECT count(*) FROM llmtasks_runs")).scalar() == 0
    engine.dispose()
    database.close()
