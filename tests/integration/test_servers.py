"""The servers that tests start keep their data, stay private, and leave nothing behind."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import create_engine, exc, inspect, text

from tests.children import lives
from tests.servers import DatabaseServer, valkey
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.redis
@pytest.mark.parametrize("unix", [False, True])
def test_killed_valkey_comes_back_with_its_data(tmp_path: Path, unix: bool) -> None:
    """What was written before a SIGKILL is there after the next start, under the same address."""
    with valkey(tmp_path / ("deep" * 20), unix=unix) as server:
        place = {"unix_socket_path": server.socket} if unix else {"host": "127.0.0.1", "port": server.port}
        with redis.Redis(**place) as client:
            client.set("key", "value")

            server.kill()
            server.start()

            assert client.get("key") == b"value"


def test_databases_are_apart_and_urls_work(database_server: DatabaseServer) -> None:
    """Each created database is empty and is dropped although somebody is connected."""
    first, second = (create_engine(database_server.create_database()) for _ in range(2))
    connection = first.connect()
    connection.execute(text("CREATE TABLE here (id int)"))
    connection.commit()

    assert inspect(first).has_table("here")
    assert not inspect(second).has_table("here")
    for engine in (first, second):
        database_server.drop_database(str(engine.url))
    with contextlib.suppress(exc.DBAPIError):
        connection.close()
    first.dispose()
    second.dispose()


def test_killed_database_comes_back_with_its_data(own_server: DatabaseServer) -> None:
    """Committed rows survive a SIGKILL of all its processes, on the same port."""
    engine = create_engine(own_server.create_database("kept"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (id int)"))
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO kept VALUES (7)"))
    engine.dispose()

    own_server.kill()
    own_server.start()

    with engine.connect() as connection:
        assert connection.execute(text("SELECT id FROM kept")).scalar() == 7
    engine.dispose()


HOLDER = """
import sys, time
from pathlib import Path
from tests.servers import mariadb, postgresql, valkey
folder = Path(sys.argv[1])
with valkey(folder / "valkey") as one, postgresql(folder) as two, mariadb(folder) as three:
    print(two.root, three.root, one.process.pid, two.process.pid, three.process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.postgresql
@pytest.mark.mariadb
@pytest.mark.redis
@pytest.mark.usefixtures("postgresql_server", "mariadb_server")  # where they are absent there is nothing to start
def test_servers_die_with_a_killed_test_process(tmp_path: Path) -> None:
    """SIGKILL of the process that started them leaves no server."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env={**os.environ}
    )
    assert holder.stdout is not None
    said = holder.stdout.readline().split()
    left_behind, pids = said[:2], said[2:]
    servers = [psutil.Process(int(pid)) for pid in pids]
    family = [*servers, *(child for server in servers for child in server.children(recursive=True))]
    assert len(family) > 4

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()

    wait_until(lambda: not any(lives(member) for member in family), message="all servers are gone")
    for folder in left_behind:
        shutil.rmtree(folder)
