"""Rules that name instants: ``Cron``, ``Interval`` and ``Once``.

Pure arithmetic: nothing here reads a clock. What comes out is aware and in UTC, and always later than what went in.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Final, TypeAlias
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from llmtasks.errors import InvalidTriggerError, nearest

#: The longest interval; far beyond any use, and far from where datetime arithmetic overflows.
MAX_INTERVAL: Final = timedelta(days=36_525)
#: A cron expression that spells out every value of every field is shorter.
MAX_EXPRESSION: Final = 1_000
#: Where ``latest_at_or_before`` stops counting the instants of a cron expression.
COUNT_LIMIT: Final = 1_000

MACROS: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
#: The five fields in order, each with what it may hold.
FIELDS: Final = (
    ("minute", "0-59"),
    ("hour", "0-23"),
    ("day-of-month", "1-31, L (the last day) or LW (the last weekday)"),
    ("month", "1-12 or JAN-DEC"),
    ("day-of-week", "0-7 or SUN-SAT (0 and 7 are Sunday), 5L (the last Friday) or 2#3 (the third Tuesday)"),
)

# Any start shows whether an expression ever fires: the rarest days, 29 February on a given weekday, are at most
# 40 years apart, and cronsim looks 50 years ahead.
_EPOCH: Final = datetime(2000, 1, 1)
_MINUTE: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Cron:
    """Fires when the clock on the wall of a time zone matches a cron expression.

    Where the clock changes, it does as Debian's cron: with a fixed minute and hour it fires once a day all the same
    (at the end of a gap that swallowed its time, at the first of two equal times); where the minute or the hour begins
    with ``*`` it follows the wall clock, not at all in a gap and twice where a time comes twice.

    Args:
        expression: Minute, hour, day of month, month and day of week, or one of ``MACROS``.
        timezone: The IANA name of the zone whose wall clock counts.

    Raises:
        InvalidTriggerError: The expression cannot be read or never fires, or nobody knows the zone.
    """

    expression: str
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        _plan(_text("expression", self.expression, "five fields, such as '0 9 * * 1-5'"))
        _zone(_text("timezone", self.timezone, "an IANA name, such as 'Europe/Berlin'"))

    def next_after(self, instant: datetime) -> datetime | None:
        """The first instant after ``instant`` that the expression names; ``None`` past the end of the calendar."""
        instant = _aware(instant)
        zone = _zone(self.timezone)
        try:
            wall = instant.astimezone(zone)
            # In the first pass through an hour that comes twice, what lies behind on the clock comes once more.
            back = (wall.utcoffset() or timedelta()) - (wall.replace(fold=1).utcoffset() or timedelta())
            starts = (wall, wall - back) if back else (wall,)
            return min([self._first(start, instant, zone) for start in starts])
        except (OverflowError, ValueError, StopIteration):  # the year 10000
            return None

    def _first(self, start: datetime, instant: datetime, zone: ZoneInfo) -> datetime:
        """The first instant after ``instant`` among the times on the wall after ``start``."""
        plan, fixed = _plan(self.expression)
        # cronsim only walks the calendar: with a zone it leaps over times where a clock moves by half an hour.
        walk = copy.copy(plan)
        walk.dt = start.replace(microsecond=0, tzinfo=None, fold=0)
        while True:
            wall = next(walk)
            found = wall.replace(tzinfo=zone).astimezone(UTC)
            if found > instant:
                while fixed and not _shows(found, wall, zone):  # inside a gap: on to its end
                    wall += _MINUTE
                    found = wall.replace(tzinfo=zone).astimezone(UTC)
                if fixed or _shows(found, wall, zone):
                    return found
            elif not fixed and (second := wall.replace(tzinfo=zone, fold=1).astimezone(UTC)) > instant:
                return second


@dataclass(frozen=True, slots=True)
class Interval:
    """Fires at its anchor and then every ``every``: a fixed grid of absolute time, which nothing late or local moves.

    Args:
        every: The distance, to the microsecond; more than nothing, at most a hundred years.
        anchor: The first instant; a naive one is the machine's local time.

    Raises:
        InvalidTriggerError: ``every`` or ``anchor`` has the wrong type or is out of range.
    """

    every: timedelta
    anchor: datetime

    def __post_init__(self) -> None:
        if not isinstance(self.every, timedelta):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidTriggerError(f"every={self.every!r}: expected a timedelta, such as timedelta(minutes=15)")
        if not timedelta() < self.every <= MAX_INTERVAL:
            raise InvalidTriggerError(f"every={self.every!r}: expected more than 0, at most {MAX_INTERVAL.days} days")
        object.__setattr__(self, "anchor", _instant("anchor", self.anchor, None))

    def next_after(self, instant: datetime) -> datetime | None:
        """The first instant of the grid after ``instant``; ``None`` past the end of the calendar."""
        behind = _aware(instant) - self.anchor
        if behind < timedelta():
            return self.anchor
        try:
            return self.anchor + (behind // self.every + 1) * self.every
        except OverflowError:
            return None


@dataclass(frozen=True, slots=True)
class Once:
    """Fires one time.

    Args:
        at: When; kept in UTC. A naive one is the time on the wall of ``timezone``, else of the machine; one inside a
            gap moves forward by the gap, one that comes twice is the first, with ``fold=1`` the second.
        timezone: The IANA name of the zone of a naive ``at``.

    Raises:
        InvalidTriggerError: ``at`` is no ``datetime`` or outside the calendar, or nobody knows the zone.
    """

    at: datetime
    timezone: str | None = None

    def __post_init__(self) -> None:
        zone = None if self.timezone is None else _zone(_text("timezone", self.timezone, "an IANA name or None"))
        object.__setattr__(self, "at", _instant("at", self.at, zone))

    def next_after(self, instant: datetime) -> datetime | None:
        """Its instant if that is after ``instant``, else ``None``."""
        return self.at if self.at > _aware(instant) else None


Trigger: TypeAlias = Cron | Interval | Once


def instants(trigger: Trigger, after: datetime, until: datetime, limit: int | None = None) -> Iterator[datetime]:
    """Yield the instants in (``after``, ``until``], earliest first, at most ``limit`` of them."""
    until = _aware(until)
    found, count = trigger.next_after(after), 0
    while found is not None and found <= until and count != limit:
        yield found
        found, count = trigger.next_after(found), count + 1


def latest_at_or_before(trigger: Trigger, after: datetime, until: datetime) -> tuple[datetime | None, int]:
    """Find the latest instant in (``after``, ``until``] and count them, in bounded work.

    Returns:
        The instant or ``None``, and how many there are; for a cron expression the count stops at ``COUNT_LIMIT``.
    """
    seen = list(instants(trigger, after, until, COUNT_LIMIT))
    if len(seen) < COUNT_LIMIT:
        return (seen[-1] if seen else None), len(seen)
    if isinstance(trigger, Interval):
        more = (until - seen[-1]) // trigger.every
        return seen[-1] + more * trigger.every, len(seen) + more
    return _bisect(trigger, seen[-1], until), len(seen)


def latest_instants(trigger: Trigger, after: datetime, until: datetime, limit: int) -> list[datetime]:
    """The latest ``limit`` instants in (``after``, ``until``], earliest first."""
    after, until = _aware(after), _aware(until)
    found = deque[datetime]()
    span = min((trigger.every if isinstance(trigger, Interval) else _MINUTE) * max(limit, 1), MAX_INTERVAL)
    # Whatever is dense is found near the end, so look back from there, each time twice as far.
    while until > after and len(found) < limit:
        start = until - span if until - after > span else after
        found.extendleft(reversed(deque(instants(trigger, start, until), maxlen=limit - len(found))))
        until, span = start, min(span * 2, MAX_INTERVAL)
    return list(found)


def _bisect(trigger: Trigger, latest: datetime, until: datetime) -> datetime:
    """The last instant at or before ``until``, where ``latest`` is one of them: each step halves what lies between."""
    high = until
    while latest < high:  # and nothing fires after high
        middle = latest + (high - latest) / 2
        found = trigger.next_after(middle)
        if found is None or found > until:
            high = middle
        else:
            latest = found
    return latest


@lru_cache(maxsize=4096)
def _plan(expression: str) -> tuple[CronSim, bool]:
    """A parsed expression, to be copied before it is iterated, and whether both its minute and its hour are fixed."""
    if len(expression) > MAX_EXPRESSION:
        raise InvalidTriggerError(f"cron {expression[:40]!r}...: expected at most {MAX_EXPRESSION} characters")
    parts = _spelled_out(expression).split()
    if len(parts) != len(FIELDS):
        names = " ".join(name for name, _ in FIELDS)
        hint = "; leave out the seconds, or use an Interval for less than a minute" if len(parts) == 6 else ""
        raise InvalidTriggerError(f"cron {expression!r}: expected five fields ({names}), it has {len(parts)}{hint}")
    try:
        plan = CronSim(" ".join(parts), _EPOCH)
        next(copy.copy(plan))
    except (CronSimError, StopIteration) as error:
        raise InvalidTriggerError(f"cron {expression!r}: {_fault(parts)}") from error
    return plan, not parts[0].startswith("*") and not parts[1].startswith("*")


def _spelled_out(expression: str) -> str:
    name = expression.strip().lower()
    if not name.startswith("@") or name in MACROS:
        return MACROS.get(name, expression)
    advice = f"did you mean {near[0]!r}?" if (near := nearest(name, MACROS)) else f"expected one of {', '.join(MACROS)}"
    raise InvalidTriggerError(f"cron {expression!r}: there is no such name; {advice}")


def _fault(parts: list[str]) -> str:
    """Where the first mistake in a refused expression is, found by trying each term on its own."""
    for position, (part, (name, allowed)) in enumerate(zip(parts, FIELDS, strict=True)):
        for term in part.split(","):
            alone = ["*"] * len(FIELDS)
            alone[position] = term or "?"
            try:
                CronSim(" ".join(alone), _EPOCH)
            except CronSimError:
                inside = "" if term == part else f" in {part!r}"
                return f"bad {name} (field {position + 1}) {term!r}{inside}: expected {allowed}, lists, ranges or steps"
    return f"it never fires: no day fits day-of-month {parts[2]!r}, month {parts[3]!r} and day-of-week {parts[4]!r}"


@lru_cache(maxsize=1024)
def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        zones = sorted(available_timezones())
        known = {zone.lower().rpartition("/")[2]: zone for zone in zones} | {zone.lower(): zone for zone in zones}
        near = dict.fromkeys(known[item] for item in nearest(name.strip().lower().replace(" ", "_"), known))
        advice = f"did you mean {' or '.join(map(repr, near))}?" if near else "expected one such as 'Europe/Berlin'"
        raise InvalidTriggerError(f"timezone={name!r}: no IANA zone has this name; {advice}") from error


def _text(option: str, value: object, expected: str) -> str:
    if not isinstance(value, str):  # the caches would fail on what cannot be hashed
        raise InvalidTriggerError(f"{option}={value!r}: expected {expected}")
    return value


def _aware(instant: datetime) -> datetime:
    if instant.tzinfo is None:
        raise ValueError(f"naive datetime {instant!r}: expected an aware one, such as datetime.now(UTC)")
    return instant.astimezone(UTC)


def _instant(option: str, at: datetime, zone: ZoneInfo | None) -> datetime:
    """``at`` in UTC; a naive one is read on the wall of ``zone``, or on the machine's."""
    if not isinstance(at, datetime):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidTriggerError(f"{option}={at!r}: expected a datetime")
    local = at if at.tzinfo else at.replace(tzinfo=zone)
    part = timedelta(microseconds=at.microsecond)
    try:
        # In a gap, fold=1 would move backward; so would a naive time's astimezone(), but not its timestamp().
        stamps = [(local - part).replace(fold=fold).timestamp() for fold in (at.fold, 0)]
        found, forward = (datetime.fromtimestamp(stamp, UTC) + part for stamp in stamps)
        return found if _shows(found, at, local.tzinfo) else forward
    except (OverflowError, ValueError) as error:
        raise InvalidTriggerError(f"{option}={at!r}: expected a time well within the years 1 to 9999") from error


def _shows(instant: datetime, wall: datetime, zone: tzinfo | None) -> bool:
    """Whether clocks in ``zone`` show ``wall`` at ``instant``; not so for a time inside a gap."""
    return instant.astimezone(zone).replace(tzinfo=None) == wall.replace(tzinfo=None)
