"""sqlalchemy-celery-beat: schedules in SQLite or PostgreSQL, read into memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

from benchmarks import stage
from benchmarks.schedulers.scheduler import PLAN_TIMEOUT, TASK, Peer, Planned, killed, locked
from tests.processes import Project

OPENED = """
import json
import sys
from datetime import UTC, datetime
import sqlalchemy as sa
from celeryconfig import beat_dburi
from sqlalchemy_celery_beat.models import CrontabSchedule, IntervalSchedule, PeriodicTask
from sqlalchemy_celery_beat.session import SessionManager

manager = SessionManager()
engine, Session = manager.create_session(beat_dburi)
manager.prepare_models(engine)
session = Session()
"""
PLAN = f"""{OPENED}
def model(every):
    found = CrontabSchedule() if every is None else IntervalSchedule(every=every, period="seconds")
    session.add(found)
    session.flush()
    return {{"discriminator": found.discriminator, "schedule_id": found.id}}

rows = json.load(open("planned.json"))
models = {{every: model(every) for _, every, _ in rows}}
session.execute(sa.insert(PeriodicTask), [
    {{"name": name, "task": "{TASK}", "args": json.dumps([name]),
      "last_run_at": datetime.fromtimestamp(last, UTC), **models[every]}}
    for name, every, last in rows
])
session.commit()
"""
#: Its start_time has it fire as soon as beat sees it.
CHANGE = f"""{OPENED}
daily = IntervalSchedule(every=1, period="days")
session.add(daily)
session.flush()
session.add(PeriodicTask(name=NAME, task="{TASK}", args=json.dumps([NAME]), schedule_model=daily,
                         start_time=datetime(2020, 1, 1, tzinfo=UTC)))
session.commit()
print(datetime.now(UTC).isoformat())
"""


class SqlalchemyCeleryBeat(Peer):
    """``DatabaseScheduler``, which looks for changes each second (``beat_max_loop_interval = 1``; its default is 5).

    Careful: ``beat_sync_every = 1``, it writes the last run after each message. SQLite waits for a lock for 30 seconds.
    """

    environment = "sqlalchemy-celery-beat"

    def __init__(self, kind: str, *, careful: bool) -> None:
        super().__init__(careful=careful)
        self._kind = kind

    def open(self, stack: ExitStack) -> Project:
        url, self._server = stack.enter_context(stage.database_in(self.folder, self._kind))
        settings = [
            'beat_scheduler = "sqlalchemy_celery_beat.schedulers:DatabaseScheduler"',
            f"beat_dburi = {url!r}",
            "beat_max_loop_interval = 1",
        ]
        if self._server is None:
            settings.append('beat_engine_options = {"connect_args": {"timeout": 30}}')
        if self.careful:
            settings.append("beat_sync_every = 1")
        return self.configured(url, "\n".join(settings))

    def plan(self, planned: Sequence[Planned]) -> None:
        self.write_plan(planned)
        self.project.python(PLAN, timeout=PLAN_TIMEOUT)

    def change(self, name: str) -> datetime | None:
        written = self.project.python(f"NAME = {name!r}\n{CHANGE}")
        return datetime.fromisoformat(written.strip()).astimezone(UTC)

    def lose_store(self, seconds: float) -> None:
        if self._server is None:
            locked(self.project.database_url, seconds)
        else:
            killed(self._server, seconds)
