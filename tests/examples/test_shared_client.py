"""The example with one HTTP client: its runs share connections, and the worker closes them at its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import or_without
from tests.ledger import sqlite_url
from tests.processes import Project
from tests.servers import valkey
from tests.waiting import wait_until


class Pages(ThreadingHTTPServer):
    """A server of pages that counts its connections."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.opened = self.closed = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Page(BaseHTTPRequestHandler):
    """Answers one connection, which stays open."""

    protocol_version = "HTTP/1.1"
    server: Pages

    def setup(self) -> None:
        super().setup()
        self.server.opened += 1

    def finish(self) -> None:
        super().finish()
        self.server.closed += 1

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "13")
        self.end_headers()
        self.wfile.write(b"one two three")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def pages() -> Iterator[Pages]:
    server = Pages()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.redis
@pytest.mark.parametrize("pool", ["asyncio", "prefork"])
def test_runs_share_one_connection_which_the_worker_closes(pool: str, pages: Pages, tmp_path: Path) -> None:
    """Five runs one after the other use one connection; after SIGTERM it is closed."""
    with or_without(valkey(tmp_path / "broker", unix=True)) as broker:
        project = Project(tmp_path / "project", broker=broker, database_url=sqlite_url(tmp_path))
        project.environ |= {"LLMTASKS_POOL": pool, "LLMTASKS_IMPORTS": "examples.shared_client"}
        try:
            worker = project.worker(concurrency=1)
            count = "import celery; print(celery.current_app.tasks['count_words_of_page'].delay(%r).get(timeout=60))"
            code = "\n".join(["import examples.shared_client", *[count % pages.url] * 5])

            assert project.python(code).split() == ["3"] * 5
            assert (pages.opened, pages.closed) == (1, 0)

            assert worker.terminate() == 0
            wait_until(lambda: pages.closed == 1, 30, "the connection is closed")
        finally:
            project.close()
