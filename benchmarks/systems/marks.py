"""What every task function does at its start and at its end: leave 24 bytes in one file, the same for all systems.

It is copied beside the tasks of each system and knows nothing but the standard library.
"""

from __future__ import annotations

import os
import struct
import time

PUBLISHED, START, END = range(3)
#: Kind, number of the task, nanoseconds since 1970. One write each, which no other process can cut in two.
RECORD = struct.Struct("<qqq")
_path = os.environ.get("MARKS")
_file = os.open(_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if _path else -1


def mark(kind: int, number: int) -> None:
    """Note that it happened now."""
    os.write(_file, RECORD.pack(kind, number, time.time_ns()))
