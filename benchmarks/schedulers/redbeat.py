"""celery-redbeat: schedules in Redis, and a lock that lets one beat at a time work."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

from benchmarks.schedulers.scheduler import PLAN_TIMEOUT, TASK, Peer, Planned, killed
from tests.processes import Project
from tests.servers import valkey

OPENED = f"""
import json
from datetime import UTC, datetime
from celery import current_app
from celery.schedules import crontab, schedule
from redbeat.schedulers import RedBeatSchedulerEntry, get_redis
current_app.loader.import_default_modules()

def save(name, every, last_run_at):
    rule = crontab() if every is None else schedule(every)
    entry = RedBeatSchedulerEntry(name, "{TASK}", rule, args=[name], last_run_at=last_run_at, app=current_app).save()
    # save() takes the rest of an interval from now and adds it to the last run.
    due = last_run_at.timestamp() + (every or 60)
    get_redis(current_app).zadd(current_app.redbeat_conf.schedule_key, {{entry.key: due}})
"""
PLAN = f"""{OPENED}
for name, every, last in json.load(open("planned.json")):
    save(name, every, datetime.fromtimestamp(last, UTC))
"""
CHANGE = f"""{OPENED}
save(NAME, 86400, datetime(2020, 1, 1, tzinfo=UTC))
print(datetime.now(UTC).isoformat())
"""


class RedBeat(Peer):
    """``RedBeatScheduler`` with a Valkey server of its own for the schedules, so that each can be away alone.

    It looks ten times a second (``beat_max_loop_interval = 0.1``). Its lock ends after 30 seconds instead of 25 minutes
    (``redbeat_lock_timeout``): another beat takes over within the minute, but not during a long burst. While its server
    is away it tries for 60 seconds (``retry_period``) instead of giving up at once.
    """

    environment = "celery-redbeat"

    def open(self, stack: ExitStack) -> Project:
        self._store = stack.enter_context(valkey(self.folder / "store"))
        settings = [
            'beat_scheduler = "redbeat.RedBeatScheduler"',
            f"redbeat_redis_url = {self._store.url!r}",
            'redbeat_redis_options = {"retry_period": 60}',
            "redbeat_lock_timeout = 30",
            "beat_max_loop_interval = 0.1",
        ]
        return self.configured("", "\n".join(settings))

    def plan(self, planned: Sequence[Planned]) -> None:
        self.write_plan(planned)
        self.project.python(PLAN, timeout=PLAN_TIMEOUT)

    def change(self, name: str) -> datetime | None:
        written = self.project.python(f"NAME = {name!r}\n{CHANGE}")
        return datetime.fromisoformat(written.strip()).astimezone(UTC)

    def lose_store(self, seconds: float) -> None:
        killed(self._store, seconds)
