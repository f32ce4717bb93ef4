"""The watchdog ends a process whose loop is blocked, whatever else is."""

import subprocess
import sys

from llmtasks.worker.watchdog import EXIT_CODE

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
while not watchdog._lags:
    time.sleep(0.01)
loop.call_soon_threadsafe(time.sleep, 600)
time.sleep(600)
"""


def test_process_ends_although_its_log_is_blocked() -> None:
    """The last message is waited for, but not for long."""
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=100)

    assert done.returncode == EXIT_CODE
    assert done.stdout.startswith("the event loop has been blocked for 0.")
