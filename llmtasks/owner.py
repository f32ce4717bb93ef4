"""Who holds a run: how the processes of a worker call themselves in the ledger."""

from __future__ import annotations

import os
import socket
import uuid
from functools import lru_cache
from typing import Final

from billiard import current_process

#: Made once before any fork, so that the main process knows how its children call themselves.
BOOT_ID: Final = f"{socket.gethostname()[:40]}/{uuid.uuid4().hex[:12]}"


def owner_of(pid: int | None = None) -> str:
    """The owner's name of a process of this worker."""
    return _owner_of(pid or os.getpid())


@lru_cache(maxsize=64)
def _owner_of(pid: int) -> str:
    return f"{BOOT_ID}/{pid}"


def in_pool_child() -> bool:
    """Whether this process is a child of the prefork pool, which may be ended without ending the worker."""
    return bool(current_process().name != "MainProcess")
