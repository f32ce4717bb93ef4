"""Totals: what ended in each past hour, summed once, so that nobody counts a million runs to read a statistic.

Keepers sum one hour after the other. They read without a lock and write only where no other keeper has moved on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from llmtasks.store import statistics
from llmtasks.store.columns import UtcDateTime
from llmtasks.store.database import Database
from llmtasks.store.dialects import PerDialect, insert_or_lock
from llmtasks.store.rows import runs, summed, totals
from llmtasks.store.statistics import Count

HOUR: Final = timedelta(hours=1)
#: An hour is summed this long after its end: ends carry the time before they were committed.
GRACE: Final = timedelta(minutes=10)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TICK: Final = timedelta(microseconds=1)
_COLUMNS: Final = ("func_name", "state", *statistics.MEASURES)
_KEEP: Final = insert(totals)
_FORGET: Final = delete(totals).where(
    totals.c.app == bindparam("of_app"), totals.c.hour < bindparam("before", type_=UtcDateTime())
)
_UNTIL: Final = select(summed.c.until).where(summed.c.app == bindparam("of_app"))
_FIRST_ENDED: Final = (
    select(runs.c.ended_at)
    .where(runs.c.app == bindparam("of_app"), runs.c.ended_at >= bindparam("since", type_=UtcDateTime()))
    .order_by(runs.c.ended_at)
    .limit(1)
)
_BEGIN: Final = PerDialect(
    lambda dialect: insert_or_lock(summed, dialect, "app").values(app=bindparam("app"), until=bindparam("until"))
)
_MOVE: Final = (
    update(summed)
    .where(summed.c.app == bindparam("of_app"), summed.c.until == bindparam("before", type_=UtcDateTime()))
    .values(until=bindparam("to"))
)
_SUMS: Final = (
    select(
        totals.c.func_name,
        totals.c.state,
        *(func.sum(totals.c[name]).label(name) for name in statistics.MEASURES),
    )
    .where(
        totals.c.app == bindparam("of_app"),
        totals.c.hour >= bindparam("since", type_=UtcDateTime()),
        totals.c.hour < bindparam("before", type_=UtcDateTime()),
    )
    .group_by(totals.c.func_name, totals.c.state)
)
_SUMS_OF: Final = _SUMS.where(totals.c.func_name == bindparam("of_func"))


def ended(tx: Connection, app: str, since: datetime, func_name: str | None = None) -> list[Count]:
    """The runs that ended at ``since`` or later, by task function and state: whole hours as they were summed.

    Of an hour that was summed runs count also when they have been purged since.
    """
    first, until = _hour_of(since + HOUR - _TICK), _until(tx, app)
    if until is None or until <= first:
        return statistics.ended(tx, app, since, func_name=func_name)
    values: dict[str, Any] = {"of_app": app, "since": first, "before": until}
    if func_name is not None:
        values["of_func"] = func_name
    return _together(
        [
            *statistics.ended(tx, app, since, first, func_name),
            *statistics.counts_of(tx.execute(_SUMS if func_name is None else _SUMS_OF, values)),
            *statistics.ended(tx, app, until, func_name=func_name),
        ]
    )


def sum_next_hour(database: Database, app: str, now: datetime) -> bool:
    """Sum the next past hour in which anything ended, unless another keeper does; says whether there was one."""
    with database.reading() as connection:
        until = _until(connection, app)
        # Hours without ends are passed over; without a row the first end of all is where summing begins.
        found = connection.execute(_FIRST_ENDED, {"of_app": app, "since": until or _EPOCH}).scalar()
        if found is None or _hour_of(found) + HOUR > now - GRACE:
            return False
        hour = _hour_of(found)
        sums = statistics.ended(connection, app, hour, hour + HOUR)
    rows = [{"app": app, "hour": hour, **{name: getattr(item, name) for name in _COLUMNS}} for item in sums]
    with database.transaction() as tx:
        if until is None:
            tx.execute(_BEGIN[tx.dialect.name], {"app": app, "until": hour})
        moved = tx.execute(_MOVE, {"of_app": app, "before": until or hour, "to": hour + HOUR}).rowcount
        if moved == 1 and rows:
            tx.execute(_KEEP, rows)
    return moved == 1


def forget(tx: Connection, app: str, before: datetime) -> None:
    """Drop the totals of hours that were over before then."""
    tx.execute(_FORGET, {"of_app": app, "before": before - HOUR})


def _until(tx: Connection, app: str) -> datetime | None:
    """Until when the past is summed."""
    found: datetime | None = tx.execute(_UNTIL, {"of_app": app}).scalar()
    return found


def _hour_of(instant: datetime) -> datetime:
    return instant.replace(minute=0, second=0, microsecond=0)


def _together(counts: Iterable[Count]) -> list[Count]:
    """Counts of the same function and state added up."""
    sums: defaultdict[tuple[str, Any], list[float]] = defaultdict(lambda: [0] * len(statistics.MEASURES))
    for item in counts:
        func_name, state, *measures = astuple(item)
        sums[func_name, state] = [a + b for a, b in zip(sums[func_name, state], measures, strict=True)]
    names = statistics.MEASURES
    return [
        Count(func_name=func_name, state=state, **dict(zip(names, measures, strict=True)))  # type: ignore[arg-type]
        for (func_name, state), measures in sums.items()
    ]
