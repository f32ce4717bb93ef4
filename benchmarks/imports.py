"""``python -m benchmarks.imports``: what ``import llmtasks`` adds to ``import celery, sqlalchemy``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.report import Benchmark, Figure, Report, below, median, run, spread

REPOSITORY = Path(__file__).parents[1]

#: Times the imports, and notes what they opened beside modules.
CODE = """
import json, sys, time

events = {"socket.connect": 0, "sqlite3.connect": 0, "subprocess.Popen": 0, "written files": 0}

def audit(event, arguments):
    if event in events:
        events[event] += 1
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events["written files"] += 1

start = time.perf_counter()
import celery, sqlalchemy
{also}
middle = time.perf_counter()
sys.addaudithook(audit)
import llmtasks
end = time.perf_counter()
print(json.dumps({"before": middle - start, "added": end - middle, "opened": events}))
"""
#: Celery loads most of itself when it is used first: what every application of it loads.
USED = "import celery.app.task, celery.canvas, celery.beat, sqlalchemy.dialects.sqlite"


def imported(also: str) -> dict[str, Any]:
    """Import in a fresh process."""
    done = _python("-c", CODE.replace("{also}", also))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def slowest() -> list[tuple[str, float]]:
    """Milliseconds by package of all modules that ``import llmtasks`` loads after celery and sqlalchemy."""
    done = _python("-X", "importtime", "-c", "import celery, sqlalchemy; import time, llmtasks")
    _, _, after = done.stderr.partition("| sqlalchemy\n")
    spent: defaultdict[str, float] = defaultdict(float)
    for line in after.splitlines():
        micros, _, name = line.removeprefix("import time:").split("|")
        if micros.strip().isdecimal():
            spent[name.strip().partition(".")[0]] += int(micros) / 1000
    return sorted(spent.items(), key=lambda item: -item[1])


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="llmtasks-benchmark-") as folder:
        environ = {**os.environ, "HOME": folder, "PYTHONPATH": str(REPOSITORY), "LLMTASKS_HOME": folder}
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=True
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--rounds", type=int, help="processes (15)")


def measure(options: argparse.Namespace) -> Report:
    """Import in fresh processes."""
    rounds = options.rounds or (2 if options.quick else 15)
    imported("")  # compiles what is not compiled yet
    bare = [imported("") for _ in range(rounds)]
    used = [imported(USED) for _ in range(rounds)]
    before, added = [item["before"] for item in bare], [item["added"] for item in bare]
    over = [item["added"] for item in used]
    opened = {name: count for name, count in bare[-1]["opened"].items() if count}
    return Report(
        name="imports",
        about=f"`import llmtasks` in a fresh process, {rounds} times; medians.",
        figures=[
            Figure(name="import celery, sqlalchemy", value=median(before), unit="s", beside=spread(before, 3)),
            below(0.15, "import llmtasks after them", median(added), "s", spread(added, 3)),
            Figure(
                name="import llmtasks where Celery was used",
                value=median(over),
                unit="s",
                beside=f"{spread(over, 3)}; loaded before: {USED.removeprefix('import ')}",
            ),
            below(1, "sockets, databases, processes, files opened", sum(opened.values()), "", str(opened or "none")),
        ],
        notes=["Most time by package: " + ", ".join(f"{name} {spent:.0f} ms" for name, spent in slowest()[:8]) + "."],
    )


BENCHMARK = Benchmark(
    name="imports",
    about="what `import llmtasks` adds to `import celery, sqlalchemy`, in time and in what it opens",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
