"""A worker does not start on tables that are not its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import Project
from tests.servers import PostgreSQL, Valkey


@pytest.mark.postgresql
def test_worker_does_not_start_on_an_outdated_schema(
    tmp_path: Path, postgresql_server: PostgreSQL, broker: Valkey
) -> None:
    """It ends with what to type instead of failing every run that it gets."""
    url = postgresql_server.create_database()
    project = Project(tmp_path / "project", broker=broker, database_url=url)

    done = subprocess.run(
        [sys.executable, "-m", "celery", "worker", "--pool", "prefork", "--concurrency", "1"],
        cwd=project.folder, env=project.environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    project.close()
    postgresql_server.drop_database(url)
    assert done.returncode != 0
    assert "celery llmtasks migrate" in done.stderr + done.stdout
