"""The watchdog knows what blocks a loop from the first moment, and ends the process whatever else is blocked."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from llmtasks.worker.watchdog import EXIT_CODE, Watchdog
from tests.waiting import wait_until

#: The handler of the log blocks while the loop is blocked, as one does that sends over a dead connection.
BLOCKED = """
import asyncio, logging, threading, time
from llmtasks.worker.watchdog import Watchdog

class Stuck(logging.Handler):
    def emit(self, record):
        print(record.getMessage().partition(" s by")[0], flush=True)
        time.sleep(600)

logging.getLogger().addHandler(Stuck())
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
watchdog = Watchdog(loop, warning=0.2, limit=0.4)
watchdog.start()
loop.call_soon_threadsafe(time.sleep, 600)
time.sleep(600)
"""


def test_process_ends_although_its_log_is_blocked() -> None:
    """The last message is waited for, but not for long."""
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=100)

    assert done.returncode == EXIT_CODE
    assert done.stdout.startswith("the event loop has been blocked for 0.")


def test_loop_that_is_blocked_at_once_is_watched_too(caplog: pytest.LogCaptureFixture) -> None:
    """What blocks it before the watchdog has looked for the first time is shown as well."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    watchdog = Watchdog(loop, warning=0.2)

    def block_at_once() -> None:
        time.sleep(0.5)

    watchdog.start()
    loop.call_soon_threadsafe(block_at_once)
    thread.start()
    wait_until(lambda: "the event loop goes on" in caplog.text or "blocked" in caplog.text, 30, "it is said")
    watchdog.stop()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()

    assert "in block_at_once" in caplog.text
