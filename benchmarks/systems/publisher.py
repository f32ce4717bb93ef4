"""``python publisher.py WAY NAME COUNT [ARGUMENT]``: sends tasks of the module ``app`` and says how long it took.

It is copied beside the tasks of each system and runs in that system's environment. ``app`` has ``connect()``,
``send(name, number, *arguments)``, perhaps ``send_many(name, rows)``, and may have all of them as coroutine functions.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import sys
import time
from typing import Any

from marks import PUBLISHED, RECORD, mark  # type: ignore[import-not-found]

#: Tasks that are sent before the clock runs: they open connections and fill caches.
WARM_UP = 20
#: Seconds that the tasks of a paced run may take together; who polls slowly gets fewer of them.
PACED_SECONDS = 20.0
PACED_TIMEOUT = 30.0


async def result_of(value: Any) -> Any:
    """The value, whether a function or a coroutine function gave it."""
    return await value if inspect.isawaitable(value) else value


async def one_by_one(app: Any, name: str, rows: list[tuple[Any, ...]]) -> None:
    """Send each as its own call."""
    if inspect.iscoroutinefunction(app.send):
        for row in rows:
            await app.send(name, *row)
    else:
        for row in rows:
            app.send(name, *row)


async def bulk(app: Any, name: str, rows: list[tuple[Any, ...]]) -> None:
    """Send all by what the system has for that; else one by one."""
    if hasattr(app, "send_many"):
        await result_of(app.send_many(name, rows))
    else:
        await one_by_one(app, name, rows)


async def paced(app: Any, name: str, rows: list[tuple[Any, ...]]) -> None:
    """Send one, wait until it ended, pause, and so on: each finds an idle worker."""
    marks, pause = os.environ["MARKS"], float(os.environ["PAUSE"])
    over = time.monotonic() + PACED_SECONDS
    before = os.stat(marks).st_size  # noqa: PTH116
    for at, row in enumerate(rows, 1):
        mark(PUBLISHED, row[0])
        await result_of(app.send(name, *row))
        late = time.monotonic() + PACED_TIMEOUT
        while os.stat(marks).st_size < before + at * 3 * RECORD.size:  # noqa: PTH116
            if time.monotonic() > late:
                raise TimeoutError(f"task {row[0]} did not run within {PACED_TIMEOUT:g} s")
            time.sleep(0.002)  # noqa: ASYNC251
        if time.monotonic() > over:
            return
        # Of random length, so that it keeps step with no timer of a worker.
        time.sleep(random.uniform(0.01, pause))  # noqa: ASYNC251


async def main(way: str, name: str, count: int, *arguments: float) -> None:
    """Send, and print how long it took."""
    import app  # type: ignore[import-not-found]

    await result_of(app.connect())
    if way == "warm":  # negative numbers are not counted
        await result_of(app.send(name, -1, *arguments))
        os._exit(0)
    rows = [(number, *arguments) for number in range(count)]
    if way == "paced":
        await paced(app, name, [(-number - 1, *arguments) for number in range(WARM_UP)])
    elif way != "preload":
        await {"one": one_by_one, "bulk": bulk}[way](app, name, rows[:WARM_UP])
    began, used = time.perf_counter(), time.process_time()
    await {"one": one_by_one, "bulk": bulk, "preload": bulk, "paced": paced}[way](app, name, rows)
    took, used = time.perf_counter() - began, time.process_time() - used
    print(json.dumps({"seconds": took, "cpu": used, "bulk": hasattr(app, "send_many")}), flush=True)
    os._exit(0)  # the connections of a dozen clients need no farewell


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *map(float, sys.argv[4:])))
