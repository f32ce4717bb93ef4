"""Run a soak, say what was done and what was counted; the exit code is 1 where something does not hold."""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import select

from llmtasks import Task
from llmtasks.dispatch import station
from llmtasks.store import rows
from tests.soak.checks import EVERY, Broken, Found, broken, calls_of
from tests.soak.load import Load
from tests.soak.plan import Step, plan
from tests.soak.stage import Stage, stage
from tests.soak.tasks import TRACE
from tests.waiting import wait_until

#: Seconds in which everything ends once nobody is killed any more. A queued run whose message is gone may be missed for
#: 30 seconds, an end that was not told is sent again after 10, 20, 40.
SETTLED = 150


def main() -> None:
    """Parse, soak, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=180, help="how long faults happen (default: %(default)g)")
    parser.add_argument("--seed", type=int, help="repeats the acts and the load of the run that printed it")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON, and the acts on stderr")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.2f} s  {text}", file=sys.stderr if options.json else sys.stdout, flush=True)

    say(f"seed {seed}, {options.seconds:g} s on {options.database}")
    on_postgresql = options.database == "postgresql"
    acts, loads = plan(seed, options.seconds, postgresql=on_postgresql)
    with (
        tempfile.TemporaryDirectory(prefix="llmtasks-soak-") as folder,
        stage(Path(folder), on_postgresql=on_postgresql, say=say) as here,
    ):
        found = soak(here, acts, loads, say)
        failures = broken(found)
        for failure in failures:
            explain(failure, found, here)
    counts = {"seed": seed, **count(found, here), "broken": [failure.what for failure in failures]}
    print(json.dumps(counts) if options.json else table(counts))
    sys.exit(1 if failures else 0)


def soak(here: Stage, acts: list[Step], loads: list[Step], say: Any) -> Found:
    """Do all of it, wait until it has settled, and look at what is there."""
    tasks = here.app.tasks
    load, errors = Load(tasks), []
    began = time.monotonic()

    def ask() -> None:
        try:
            for step in loads:
                time.sleep(max(0.0, began + step.at - time.monotonic()))
                load.do(step)
        except BaseException as error:
            errors.append(error)
            raise

    asking = threading.Thread(target=ask, name="load", daemon=True)
    say("the load begins")
    asking.start()
    for step in acts:  # here, because what a thread starts dies with it
        while time.monotonic() < began + step.at:
            here.tend()
            time.sleep(0.05)
        here.act(step)

    def load_ended() -> bool:
        here.tend(all_now=True)
        return not asking.is_alive()

    wait_until(load_ended, 120, "the load to end")
    if errors:
        raise errors[0]
    for name in EVERY:
        Task.get_sync(name).pause_sync()
    say("the faults have stopped, the schedules are paused")
    stopped = time.monotonic()
    while not is_settled(found := look(here, load)) and time.monotonic() < stopped + SETTLED:
        here.tend()
        time.sleep(0.3)
    say(f"settled {time.monotonic() - stopped:.1f} s later" if is_settled(found) else "it has not settled")
    return found


def look(here: Stage, load: Load) -> Found:
    """Everything that there is now."""
    with station(here.app).database.reading() as connection:
        return Found(
            runs={row.id: row for row in connection.execute(select(rows.runs))},
            outbox=list(connection.execute(select(rows.outbox.c.run_id)).scalars()),
            slots=list(connection.execute(select(rows.slots.c.run_id)).scalars()),
            messages=messages(here),
            calls=calls_of(here.project.folder / TRACE, here.deaths),
            asked=load.asked,
            put_backs_at=here.put_backs_at,
        )


def is_settled(found: Found) -> bool:
    """Whether nothing is under way any more."""
    one_offs = {run.schedule_id for run in found.runs.values()}
    accepted = found.asked.runs <= set(found.runs) and found.asked.one_offs <= one_offs
    under_way = any(not run.delivered or run.owner is not None for run in found.runs.values())
    return accepted and not under_way and not (found.outbox or found.slots or found.messages)


def messages(here: Stage) -> dict[str, int]:
    """How many messages each key of the broker holds: queues are lists, deliveries a hash and an index."""
    with redis.Redis(unix_socket_path=here.project.broker.socket) as client:
        size = {b"list": client.llen, b"hash": client.hlen, b"zset": client.zcard}
        keys = [key for key in client.keys("*") if key.startswith((b"celery\x06", b"llmtasks.")) or key == b"celery"]
        found = {key.decode(): size[kind](key) for key in keys if (kind := client.type(key)) in size}
    return {key: count for key, count in found.items() if count and "wake" not in key}


def explain(failure: Broken, found: Found, here: Stage) -> None:
    """Print what is needed to look into something that does not hold."""
    print(f"\nDOES NOT HOLD: {failure.what}", file=sys.stderr)
    for run_id in failure.runs[:3]:
        print(f"  {dict(found.runs[run_id]._mapping) if run_id in found.runs else run_id}", file=sys.stderr)
        for call in found.calls:
            if call.run == run_id:
                print(f"    {call}", file=sys.stderr)
        for process in here.processes:
            for line in [line for line in process.log().splitlines() if run_id in line][-8:]:
                print(f"    {process.name}: {line}", file=sys.stderr)
    for process in here.processes:
        print(f"  the end of {process.name}'s log:\n{process.tail(8)}", file=sys.stderr)


def count(found: Found, here: Stage) -> dict[str, dict[str, int]]:
    """What was done, asked for, and found."""
    by_run = Counter(call.run for call in found.calls)
    attempts = {(call.run, call.attempt) for call in found.calls}
    return {
        "acts": dict(here.done),
        "accepted": found.asked.accepted,
        "refused while a server was away": found.asked.refused,
        "runs": Counter(str(run.state) for run in found.runs.values()),
        "instants": {
            name: sum(run.stands_for for run in found.runs.values() if run.name == name) for name in EVERY
        },
        "calls": {
            "calls": len(found.calls),
            "runs called": len(by_run),
            "attempts recorded": sum(run.attempts for run in found.runs.values()),
            "attempts lost": sum(run.losses for run in found.runs.values()),
            "put back, uncounted": len(found.calls) - len(attempts),
        },
    }  # fmt: skip


def table(counts: dict[str, Any]) -> str:
    """The counts for people."""
    lines = [f"seed {counts['seed']}"]
    for title, group in counts.items():
        if isinstance(group, dict):
            lines += [title, *(f"  {name:<28}{number:>8}" for name, number in group.items())]
    held = "everything holds" if not counts["broken"] else f"{len(counts['broken'])} things do not hold"
    return "\n".join([*lines, held])


if __name__ == "__main__":
    main()
