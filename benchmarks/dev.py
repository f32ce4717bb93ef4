"""``python -m benchmarks.dev``: how soon ``llmtasks dev`` is ready, in an empty home."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Benchmark, Figure, Report, below, median, run, spread
from tests.children import ChildProcess
from tests.servers import free_port
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[1]


def started(*options: str) -> dict[str, float]:
    """Seconds from the start of the command until each process is up, and until all are (``ready``)."""
    with tempfile.TemporaryDirectory(prefix="llmtasks-benchmark-") as name:
        folder = Path(name)
        for file in ("celeryconfig.py", "Procfile"):
            shutil.copy(REPOSITORY / file, folder)
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("LLMTASKS_", "CELERY_"))}
        began = time.monotonic()
        command = ChildProcess(
            [Path(sys.executable).with_name("llmtasks"), "dev", "--json", "--port", str(free_port()), *options],
            name="llmtasks dev",
            log=folder / "dev.log",
            cwd=folder,
            environ={**environ, "HOME": name, "PYTHONPATH": str(REPOSITORY)},
            death_signal=signal.SIGTERM,
        )
        seen: dict[str, float] = {}

        def ready() -> bool:
            for event in _events(command):
                if event["event"] in {"up", "ready"}:
                    seen.setdefault(event.get("process", "ready"), time.monotonic() - began)
            assert command.running, command.tail()
            return "ready" in seen

        try:
            wait_until(ready, 120, "llmtasks dev to be ready", interval=0.02)
            command.terminate()
        finally:
            command.close()
        return seen


def _events(command: ChildProcess) -> list[dict[str, Any]]:
    lines = command.log_of_this_start().split("\n")[:-1]
    return [json.loads(line) for line in lines if line.startswith('{"event"')]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--rounds", type=int, help="starts (5)")


def measure(options: argparse.Namespace) -> Report:
    """Start it a few times."""
    rounds = options.rounds or (1 if options.quick else 5)
    found = [started() for _ in range(rounds)]
    ready = [item["ready"] for item in found]
    parts = [name for name in found[0] if name != "ready"]
    return Report(
        name="dev",
        about=(
            f"`llmtasks dev` (broker, worker, beat, Flower) in an empty home, {rounds} times; medians, "
            "from the start of the command."
        ),
        figures=[
            *(Figure(name=f"{name} is up", value=median(item[name] for item in found), unit="s") for name in parts),
            below(8, "ready", median(ready), "s", spread(ready, 1)),
        ],
    )


BENCHMARK = Benchmark(
    name="dev", about="how soon `llmtasks dev` is ready, in an empty home", add_options=add_options, measure=measure
)

if __name__ == "__main__":
    run(BENCHMARK)
