"""``python pinned.py CORES PROGRAM ...``: becomes the program, which on Linux stays on these cores (1,3)."""

from __future__ import annotations

import os
import sys

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(core) for core in sys.argv[1].split(",")})
os.execv(sys.argv[2], sys.argv[2:])
