"""Connections that lay idle are asked whether they still live; asking at every checkout would double round trips."""

from __future__ import annotations

import time
from typing import Any, Final

from sqlalchemy import Engine, event, exc

#: A connection used within this many seconds is taken as it is.
IDLE: Final = 1.0
_SINCE: Final = "llmtasks_idle_since"


def ping_idle(engine: Engine) -> None:
    """Let the engine's pool replace idle connections that the server has closed meanwhile."""

    def went_idle(_connection: Any, record: Any) -> None:
        record.info[_SINCE] = time.monotonic()

    def taken(connection: Any, record: Any, _proxy: Any) -> None:
        since = record.info.get(_SINCE)
        if since is None or time.monotonic() - since < IDLE:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as gone:
            # All the pool's older connections are as dead as this one.
            raise exc.InvalidatePoolError from gone

    event.listen(engine, "checkin", went_idle)
    event.listen(engine, "checkout", taken)
