"""The soak, in its shortest form; ``make soak`` is the long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import PostgreSQL, Valkey
from tests.soak.plan import ACTS

REPOSITORY = Path(__file__).parents[2]
#: Among the acts of this seed is each kind.
SEED = 1

pytestmark = [pytest.mark.redis, pytest.mark.postgresql, pytest.mark.fault, pytest.mark.slow]


@pytest.mark.timeout(330)
def test_what_is_accepted_ends_once_whoever_is_killed(valkey_server: Valkey, postgresql_server: PostgreSQL) -> None:
    """Twenty seconds of kills under load, then nothing is lost, doubled, over a limit, or left behind."""
    # The soak has servers of its own; where these are not here, it cannot have them either.
    assert valkey_server.process.running
    assert postgresql_server.process.running
    options = ["--seconds", "20", "--seed", str(SEED), "--database", "postgresql", "--json"]

    command = [sys.executable, "-m", "tests.soak", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=320)

    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"
    counts = json.loads(done.stdout)
    assert counts["seed"] == SEED
    assert counts["broken"] == []
    assert set(counts["acts"]) <= set(ACTS)
    assert sum(counts["acts"].values()) >= 3
    assert sum(counts["accepted"].values()) >= 20
