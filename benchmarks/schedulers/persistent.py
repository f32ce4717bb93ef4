"""Celery's own scheduler: schedules in the configuration, last runs in a file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime

from benchmarks.schedulers.scheduler import TASK, Peer, Planned
from tests.processes import Project


class Persistent(Peer):
    """``celery.beat:PersistentScheduler``. Careful: ``beat_sync_every = 1``, it writes its file after each message.

    Two beats have a file each, as on two hosts: the same file cannot be opened twice.
    """

    environment = "celery"
    has_store = False
    SETTINGS = f"""
import json
from celery.schedules import crontab

beat_schedule = {{
    name: {{"task": "{TASK}", "args": [name], "schedule": every or crontab()}}
    for name, every, _ in json.load(open("planned.json"))
}}
"""

    def open(self, stack: ExitStack) -> Project:
        self._planned: list[Planned] = []
        return self.configured("", self.SETTINGS + ("beat_sync_every = 1\n" if self.careful else ""))

    def beat_options(self, number: int) -> list[str]:
        return ["-s", f"beat-{number}"]

    def plan(self, planned: Sequence[Planned]) -> None:
        self._planned += planned
        self.write_plan(self._planned)

    def change(self, name: str) -> datetime | None:
        return None

    def lose_store(self, seconds: float) -> None:
        raise NotImplementedError("it has a file of its own")
