"""Triggers move forward, and agree with going through every minute by hand."""

from bisect import bisect_left
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from itertools import accumulate, pairwise
from zoneinfo import ZoneInfo

from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtasks.errors import InvalidTriggerError
from llmtasks.triggers import Cron, Interval, Once, Trigger, instants, latest_at_or_before, latest_instants

MINUTE = timedelta(minutes=1)
#: The same examples each time, however slow the machine is at the moment.
repeatable = settings(deadline=None, derandomize=True)
#: Days of 2026 on which a clock changes by an hour, by half an hour, at midnight, in the south, and not at all.
CHANGES = [
    ("Europe/Berlin", datetime(2026, 3, 29, tzinfo=UTC)),
    ("Europe/Berlin", datetime(2026, 10, 25, tzinfo=UTC)),
    ("America/New_York", datetime(2026, 3, 8, tzinfo=UTC)),
    ("America/New_York", datetime(2026, 11, 1, tzinfo=UTC)),
    ("Australia/Lord_Howe", datetime(2026, 4, 4, tzinfo=UTC)),
    ("Australia/Lord_Howe", datetime(2026, 10, 3, tzinfo=UTC)),
    ("America/Havana", datetime(2026, 3, 8, tzinfo=UTC)),
    ("America/Havana", datetime(2026, 11, 1, tzinfo=UTC)),
    ("Africa/Cairo", datetime(2026, 4, 24, tzinfo=UTC)),
    ("America/Santiago", datetime(2026, 9, 6, tzinfo=UTC)),
    ("Asia/Kathmandu", datetime(2026, 6, 1, tzinfo=UTC)),
    ("UTC", datetime(2026, 12, 31, tzinfo=UTC)),
]


@dataclass(frozen=True)
class Field:
    """The text of a cron field and the values that it stands for."""

    text: str
    values: frozenset[int]

    @property
    def wild(self) -> bool:
        return self.text.startswith("*")


def fields(low: int, high: int, top: int | None = None) -> st.SearchStrategy[Field]:
    """Fields of values from ``low`` to ``high``, whose plain numbers end at ``top``."""
    everything = range(low, high + 1)
    number = st.integers(low, top or high)
    return st.one_of(
        st.just(Field("*", frozenset(everything))),
        st.integers(1, 20).map(lambda step: Field(f"*/{step}", frozenset(everything[::step]))),
        number.map(lambda value: Field(str(value), frozenset({value}))),
        st.tuples(number, number)
        .map(sorted)
        .map(lambda ends: Field(f"{ends[0]}-{ends[1]}", frozenset(range(ends[0], ends[1] + 1)))),
        st.lists(number, min_size=1, max_size=4).map(lambda some: Field(",".join(map(str, some)), frozenset(some))),
    )


@dataclass(frozen=True)
class Simple:
    """A cron expression of the plain kind, and whether it matches a time on the wall, worked out without cronsim."""

    minute: Field
    hour: Field
    day: Field
    weekday: Field

    @property
    def expression(self) -> str:
        return f"{self.minute.text} {self.hour.text} {self.day.text} * {self.weekday.text}"

    @property
    def fixed(self) -> bool:
        return not self.minute.wild and not self.hour.wild

    def matches(self, wall: datetime) -> bool:
        return wall.minute in self.minute.values and wall.hour in self.hour.values and self._fits_day(wall)

    def _fits_day(self, wall: datetime) -> bool:
        both = wall.day in self.day.values, wall.isoweekday() % 7 in self.weekday.values
        return all(both) if self.day.wild or self.weekday.wild else any(both)

    def by_hand(self, zone: ZoneInfo, after: datetime, until: datetime) -> list[datetime]:
        """Its instants in (after, until], by going through every minute."""
        minutes = [after + step * MINUTE for step in range((until - after) // MINUTE + 1)]
        if not self.fixed:
            return [instant for instant in minutes if instant > after and self.matches(instant.astimezone(zone))]
        # Each matching time on the wall once: the first minute at which the clock has come so far.
        start, end = (edge.astimezone(zone).replace(tzinfo=None) for edge in (minutes[0], minutes[-1]))
        walls = (start + step * MINUTE for step in range(-180, (end - start) // MINUTE + 181))
        around = [minutes[0] + step * MINUTE for step in range(-240, len(minutes) + 240)]
        latest = list(accumulate((instant.astimezone(zone).replace(tzinfo=None) for instant in around), max))
        found = {around[bisect_left(latest, wall)] for wall in walls if self.matches(wall)}
        return sorted(instant for instant in found if after < instant <= until)


simple = st.builds(Simple, fields(0, 59), fields(0, 23), fields(1, 31), fields(0, 6))
early = st.builds(
    Simple, fields(0, 59), fields(0, 23, top=4), st.just(Field("*", frozenset(range(1, 32)))), fields(0, 6)
)
zones = st.sampled_from(sorted({zone for zone, _ in CHANGES}))
moments = st.datetimes(datetime(1990, 1, 1), datetime(2150, 1, 1), timezones=st.just(UTC))
intervals = st.builds(
    Interval,
    st.timedeltas(timedelta(microseconds=1), timedelta(days=400)),
    st.datetimes(timezones=st.just(UTC), min_value=datetime(1980, 1, 1), max_value=datetime(2200, 1, 1)),
)
crons = st.builds(lambda rule, zone: Cron(rule.expression, zone), simple, zones)
triggers: st.SearchStrategy[Trigger] = st.one_of(crons, intervals, st.builds(Once, moments))


@repeatable
@given(trigger=triggers, instant=moments)
def test_the_next_instant_is_strictly_later_and_in_utc(trigger: Trigger, instant: datetime) -> None:
    """Nothing fires at or before the instant that was asked about."""
    found = trigger.next_after(instant)

    assert found is None or (found > instant and found.tzinfo is UTC)


@repeatable
@given(trigger=triggers, one=moments, other=moments)
def test_asking_later_never_gives_an_earlier_instant(trigger: Trigger, one: datetime, other: datetime) -> None:
    """next_after is monotone."""
    earlier, later = sorted((one, other))
    end = datetime.max.replace(tzinfo=UTC)

    assert (trigger.next_after(earlier) or end) <= (trigger.next_after(later) or end)


@repeatable
@given(trigger=triggers, instant=moments, share=st.floats(0, 0.999))
def test_there_is_nothing_between_an_instant_and_the_next(trigger: Trigger, instant: datetime, share: float) -> None:
    """Asked anywhere before the next instant, the answer is the same."""
    found = trigger.next_after(instant)

    if found is not None:
        assert trigger.next_after(min(instant + (found - instant) * share, found - timedelta.resolution)) == found


@repeatable
@given(trigger=triggers, instant=moments, hours=st.integers(-14, 14))
def test_the_zone_of_the_question_does_not_matter(trigger: Trigger, instant: datetime, hours: int) -> None:
    """The same instant written in another offset has the same answer."""
    assert trigger.next_after(instant.astimezone(timezone(timedelta(hours=hours)))) == trigger.next_after(instant)


@repeatable
@given(interval=intervals, instant=moments)
def test_an_interval_stays_on_its_grid(interval: Interval, instant: datetime) -> None:
    """Each instant is a whole number of steps from the anchor, and no more than one step away."""
    found = interval.next_after(instant)

    assert found is not None
    assert (found - interval.anchor) % interval.every == timedelta()
    assert found == interval.anchor or found - instant <= interval.every


@settings(repeatable, max_examples=60)
@given(rule=early, change=st.sampled_from(CHANGES), offset=st.integers(0, 24 * 60 * 60))
@example(
    # The clock on Lord Howe Island goes from 02:00 back to 01:30.
    rule=Simple(
        Field("*/20", frozenset({0, 20, 40})),
        Field("2", frozenset({2})),
        Field("*", frozenset(range(32))),
        Field("*", frozenset(range(7))),
    ),
    change=CHANGES[4],
    offset=0,
)
def test_cron_agrees_with_going_through_every_minute_around_a_change(
    rule: Simple, change: tuple[str, datetime], offset: int
) -> None:
    """Around a change of the clock, the instants are exactly those that a walk over all minutes finds."""
    zone, day = change
    after, until = day - timedelta(days=1), day + timedelta(days=2)

    found = list(instants(Cron(rule.expression, zone), after, until))

    expected = rule.by_hand(ZoneInfo(zone), after, until)
    assert found == expected
    start = after + timedelta(seconds=offset, microseconds=offset)
    assert list(instants(Cron(rule.expression, zone), start, until)) == [
        instant for instant in expected if instant > start
    ]


@repeatable
@given(rule=simple, zone=zones, instant=moments)
def test_every_instant_of_a_wildcard_cron_is_a_match_on_the_wall(rule: Simple, zone: str, instant: datetime) -> None:
    """What fires is what the clock shows, on the minute; a fixed time may move to the end of a gap."""
    for found in instants(Cron(rule.expression, zone), instant, datetime.max.replace(tzinfo=UTC), 5):
        wall = found.astimezone(ZoneInfo(zone))
        assert (wall.second, wall.microsecond) == (0, 0)
        before = (found - MINUTE).astimezone(ZoneInfo(zone))
        after_gap = wall.utcoffset() != before.utcoffset()
        assert rule.matches(wall) or (rule.fixed and after_gap)


@repeatable
@given(rule=simple, zone=zones, instant=moments)
def test_a_cron_whose_time_is_fixed_fires_at_most_once_at_each_time_on_the_wall(
    rule: Simple, zone: str, instant: datetime
) -> None:
    """With a fixed minute and hour, no time on the wall fires twice, also where it comes twice."""
    cron = Cron(rule.expression, zone)
    walls = [
        found.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
        for found in instants(cron, instant, datetime.max.replace(tzinfo=UTC), 30)
    ]

    assert not rule.fixed or all(one < other for one, other in pairwise(walls))


@repeatable
@given(trigger=triggers, start=moments, length=st.timedeltas(timedelta(), timedelta(days=3)), limit=st.integers(0, 50))
def test_the_ends_of_a_span_agree_with_the_whole_span(
    trigger: Trigger, start: datetime, length: timedelta, limit: int
) -> None:
    """The latest instant, the count and the last few are those of the full list, where that is short enough to make."""
    if isinstance(trigger, Interval):
        length = min(length, trigger.every * 1_500)
    whole = list(instants(trigger, start, start + length))

    latest, count = latest_at_or_before(trigger, start, start + length)

    assert latest == (whole[-1] if whole else None)
    assert count == (min(len(whole), 1_000) if isinstance(trigger, Cron) else len(whole))
    assert latest_instants(trigger, start, start + length, limit) == whole[max(len(whole) - limit, 0) :]


words = st.sampled_from(["*", "/", "-", ",", "#", "L", "W", "MON", "jan", "0", "5", "31", "60", "?", "@", " ", "²"])


@repeatable
@given(
    expression=st.one_of(st.text(max_size=30), st.lists(words, max_size=14).map("".join)),
    zone=st.one_of(zones, st.text(max_size=12)),
)
def test_whatever_is_written_is_a_trigger_or_a_clear_refusal(expression: str, zone: str) -> None:
    """No text makes the parser fail in another way than by InvalidTriggerError."""
    try:
        cron = Cron(expression, zone)
    except InvalidTriggerError as refusal:
        message = str(refusal)
    else:
        assert cron.next_after(datetime(2026, 1, 1, tzinfo=UTC)) is not None
        return

    assert message.startswith(("cron ", "timezone="))
