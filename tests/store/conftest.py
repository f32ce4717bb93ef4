"""One database for each test of the store, on each of ``DATABASES`` alike."""

import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from llmtasks.store import rows
from llmtasks.store.database import Database
from tests.conftest import DATABASES, parameters
from tests.servers import DatabaseServer

#: MariaDB's tables that lost more rows than this are no longer as new: pages and statistics remember them.
MANY = 1_000
#: Databases that tests have left as they found them, by the names of their servers.
_used: defaultdict[str, list[str]] = defaultdict(list)


@pytest.fixture(scope="session")
def sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with llmtasks' tables, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "llmtasks.db"
    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(params=parameters(DATABASES))
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The SQLAlchemy URL of a database with llmtasks' tables and no rows.

    One database of a server is used by many tests: making its tables takes longer than most of them.
    """
    if request.param == "sqlite":
        path = shutil.copy(request.getfixturevalue("sqlite_file"), tmp_path)
        yield f"sqlite:///{path}"
        return
    server: DatabaseServer = request.getfixturevalue(f"{request.param}_server")
    used = _used[request.param]
    url = used.pop() if used else _migrate(server.create_database())
    yield url
    server.cut(url)
    if _is_as_before(url):
        used.append(url)
    else:
        server.drop_database(url)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database with llmtasks' tables."""
    database = Database(database_url)
    yield database
    database.close()


def _migrate(url: str) -> str:
    database = Database(url)
    database.migrate()
    database.close()
    return url


def _is_as_before(url: str) -> bool:
    """Empty the tables; says whether nothing is left of the test that used them."""
    database = Database(url)
    with database.transaction() as tx:
        alone = {*inspect(tx).get_table_names()} == {*rows.metadata.tables, rows.VERSION_TABLE}
        if tx.dialect.name == "postgresql":
            tx.execute(text(f"TRUNCATE {', '.join(rows.metadata.tables)}"))
            deleted = 0
        else:
            deleted = sum(tx.execute(table.delete()).rowcount for table in rows.metadata.tables.values())
    if "mysql" in url:
        with database.reading() as connection:  # what deleted rows leave behind is locked by those that come beside it
            connection.execute(text("SET GLOBAL innodb_max_purge_lag_wait = 0"))
    database.close()
    return alone and deleted <= MANY
