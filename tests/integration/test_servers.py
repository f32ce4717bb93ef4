"""The servers that tests start keep their data, stay private, and leave nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from tests.children import lives
from tests.servers import PostgreSQL, postgresql, valkey
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


@pytest.mark.postgresql
def test_databases_are_apart_and_urls_work(postgresql_server: PostgreSQL) -> None:
    """Each created database is empty and is dropped although somebody is connected."""
    first, second = postgresql_server.create_database(), postgresql_server.create_database()
    connection = psycopg.connect(first.replace("+psycopg", ""), autocommit=True)
    connection.execute("CREATE TABLE here (id int)")

    with psycopg.connect(second.replace("+psycopg", "")) as other:
        found = other.execute("SELECT to_regclass('here')").fetchone()

    assert found == (None,)
    postgresql_server.drop_database(first)
    postgresql_server.drop_database(second)
    connection.close()


@pytest.mark.postgresql
def test_killed_postgresql_comes_back_with_its_data(tmp_path: Path) -> None:
    """Committed rows survive a SIGKILL of all its processes, on the same port."""
    with postgresql(tmp_path) as server:
        url = server.create_database("kept").replace("+psycopg", "")
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE kept (id int)")

        server.kill()
        server.start()

        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT to_regclass('kept')").fetchone() == ("kept",)


HOLDER = """
import sys, time
from pathlib import Path
from tests.servers import postgresql, valkey
folder = Path(sys.argv[1])
with valkey(folder / "valkey") as one, postgresql(folder) as two:
    print(one.process.pid, two.process.pid, two.root, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.postgresql
@pytest.mark.redis
def test_servers_die_with_a_killed_test_process(tmp_path: Path) -> None:
    """SIGKILL of the process that started them leaves no server."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env={**os.environ}
    )
    assert holder.stdout is not None
    *pids, left_behind = holder.stdout.readline().split()
    servers = [psutil.Process(int(pid)) for pid in pids]
    family = [*servers, *(child for server in servers for child in server.children(recursive=True))]
    assert len(family) > 3

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()

    wait_until(lambda: not any(lives(member) for member in family), message="all servers are gone")
    shutil.rmtree(left_behind)
