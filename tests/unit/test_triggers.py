"""Cron, Interval and Once: which instants they name, and what they refuse."""

import copy
import json
import pickle
import time
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from llmtasks.errors import InvalidTriggerError
from llmtasks.triggers import (
    COUNT_LIMIT,
    MAX_INTERVAL,
    Cron,
    Interval,
    Once,
    Trigger,
    instants,
    latest_at_or_before,
    latest_instants,
)

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "cases" / "time_cases.json").read_text())
NEW_YORK = ZoneInfo("America/New_York")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def built(case: dict[str, Any]) -> Trigger:
    if case["kind"] == "interval":
        return Interval(timedelta(seconds=case["seconds"]), datetime.fromisoformat(case["anchor"]))
    if case["kind"] == "once":
        return Once(datetime.fromisoformat(case["expr"]).replace(fold=case["fold"]), case["tz"])
    return Cron(case["expr"], case["tz"])


def first(trigger: Trigger, after: str, count: int = 5) -> list[datetime]:
    return list(instants(trigger, datetime.fromisoformat(after), datetime(9000, 1, 1, tzinfo=UTC), count))


@pytest.fixture
def machine_in_new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine's own time zone is New York's."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# --- the cases ---


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["kind"] != "invalid"],
    ids=lambda case: f"{case['expr']} {case['tz']}: {case['note']}",
)
def test_each_case_names_the_expected_instants(case: dict[str, Any]) -> None:
    """Every case of cases/time_cases.json that is a trigger yields its instants, in UTC."""
    found = first(built(case), case["after"])

    assert [f"{instant:%Y-%m-%dT%H:%M:%SZ}" for instant in found] == case["expected"]
    assert all(instant.tzinfo is UTC for instant in found)


@pytest.mark.parametrize("case", [case for case in CASES if case["kind"] == "invalid"], ids=lambda case: case["expr"])
def test_each_invalid_case_is_refused_at_construction(case: dict[str, Any]) -> None:
    """Every case of cases/time_cases.json that is invalid is refused before it can be stored."""
    with pytest.raises(InvalidTriggerError, match="cron "):
        built(case)


def test_no_case_is_left_out() -> None:
    """The kinds of cases are those that these tests know."""
    assert {case["kind"] for case in CASES} == {"cron", "interval", "once", "invalid"}


# --- Cron ---


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("0 0 L * *", ["2026-01-31T00:00Z", "2026-02-28T00:00Z", "2026-03-31T00:00Z"]),
        ("0 0 LW * *", ["2026-01-30T00:00Z", "2026-02-27T00:00Z", "2026-03-31T00:00Z"]),
        ("0 0 * * 5L", ["2026-01-30T00:00Z", "2026-02-27T00:00Z", "2026-03-27T00:00Z"]),
        ("0 0 * * 2#3", ["2026-01-20T00:00Z", "2026-02-17T00:00Z", "2026-03-17T00:00Z"]),
        ("0 0 * * 7", ["2026-01-04T00:00Z", "2026-01-11T00:00Z", "2026-01-18T00:00Z"]),
        ("0 0 * * 6-7", ["2026-01-03T00:00Z", "2026-01-04T00:00Z", "2026-01-10T00:00Z"]),
        ("0 0 1 jan,Jul *", ["2026-07-01T00:00Z", "2027-01-01T00:00Z", "2027-07-01T00:00Z"]),
        (" @Hourly ", ["2026-01-01T01:00Z", "2026-01-01T02:00Z", "2026-01-01T03:00Z"]),
        ("@monthly", ["2026-02-01T00:00Z", "2026-03-01T00:00Z", "2026-04-01T00:00Z"]),
        ("@yearly", ["2027-01-01T00:00Z", "2028-01-01T00:00Z", "2029-01-01T00:00Z"]),
        ("0 0 29 2 */7", ["2032-02-29T00:00Z", "2060-02-29T00:00Z", "2088-02-29T00:00Z"]),
    ],
)
def test_cron_knows_the_usual_extensions(expression: str, expected: list[str]) -> None:
    """Names, L, LW, 5L, 2#3, 7 for Sunday and the names with an @ all mean what other crons mean by them."""
    assert first(Cron(expression), "2026-01-01T00:00Z", 3) == [at(text) for text in expected]


def test_an_instant_inside_the_repeated_hour_has_later_ones_after_it() -> None:
    """Asked in the second pass through an hour, a daily time in the first pass is over until tomorrow."""
    second_pass = datetime(2026, 11, 1, 1, 10, tzinfo=NEW_YORK, fold=1)

    found = Cron("30 1 * * *", "America/New_York").next_after(second_pass)

    assert found == at("2026-11-02T06:30Z")


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        # 02:00 at +10:30 comes after the repeated half hour from 01:30 on.
        ("*/20 2 * * *", "2026-04-04T14:00Z", ["2026-04-04T15:30Z", "2026-04-04T15:50Z", "2026-04-04T16:10Z"]),
        # 02:30 at +11 is the minute after 01:59 at +10:30.
        ("30 * * * *", "2026-10-03T15:10Z", ["2026-10-03T15:30Z", "2026-10-03T16:30Z", "2026-10-03T17:30Z"]),
    ],
)
def test_a_clock_that_moves_by_half_an_hour_loses_no_instant(expression: str, after: str, expected: list[str]) -> None:
    """On Lord Howe Island, whose clock moves by 30 minutes, each matching time on the wall is there."""
    assert first(Cron(expression, "Australia/Lord_Howe"), after, 3) == [at(text) for text in expected]


def test_a_gap_at_midnight_does_not_swallow_the_first_hour_after_it() -> None:
    """Where midnight is skipped, wildcard minutes of 01:00 still fire on that day."""
    found = first(Cron("*/30 1 * * 0", "America/Havana"), "2026-03-13T00:00Z", 2)

    assert found == [at("2026-03-08T05:00Z") + timedelta(days=7), at("2026-03-08T05:30Z") + timedelta(days=7)]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("60 * * * *", r"bad minute \(field 1\) '60': expected 0-59"),
        ("0 25 * * *", r"bad hour \(field 2\) '25': expected 0-23"),
        ("0 0 1,32 * *", r"bad day-of-month \(field 3\) '32' in '1,32': expected 1-31"),
        ("0 0 1,,2 * *", r"bad day-of-month \(field 3\) '' in '1,,2'"),
        ("0 0 * FOO *", r"bad month \(field 4\) 'FOO': expected 1-12 or JAN-DEC"),
        ("0 0 * * SAT-SUN", r"bad day-of-week \(field 5\) 'SAT-SUN': expected 0-7 or SUN-SAT"),
        ("*/0 * * * *", r"bad minute \(field 1\) '\*/0'"),
        ("0 0 31 4,6 *", r"it never fires: no day fits day-of-month '31', month '4,6'"),
        ("0 0 */10 2 MON#5", r"it never fires"),
        ("* * * *", r"expected five fields \(minute hour day-of-month month day-of-week\), it has 4$"),
        ("0 0 0 * * *", r"it has 6; leave out the seconds, or use an Interval"),
        ("", r"it has 0"),
        ("@dayly", r"did you mean '@daily'\?"),
        ("@reboot", r"there is no such name; expected one of @yearly"),
        ("1," * 600 + "1 * * * *", r"expected at most 1000 characters"),
        (None, r"expression=None: expected five fields"),
        (["*"], r"expression=\['\*'\]: expected five fields"),
    ],
)
def test_a_bad_expression_is_refused_with_what_and_where(expression: Any, message: str) -> None:
    """What cannot be read says which field and which text; what never fires says so."""
    with pytest.raises(InvalidTriggerError, match=message):
        Cron(expression)


@pytest.mark.parametrize(
    ("zone", "message"),
    [
        ("Europe/Berln", r"did you mean 'Europe/Berlin'"),
        ("europe/berlin", r"did you mean 'Europe/Berlin'"),
        ("Berlin", r"did you mean 'Europe/Berlin'"),
        ("New York", r"did you mean 'America/New_York'"),
        ("utc", r"did you mean 'UTC'"),
        ("qqq", r"expected one such as 'Europe/Berlin'"),
        ("../etc", r"no IANA zone has this name"),
        ("", r"no IANA zone has this name"),
        (5, r"timezone=5: expected an IANA name"),
    ],
)
def test_an_unknown_zone_is_refused_with_its_nearest_names(zone: Any, message: str) -> None:
    """A zone that nobody knows is refused, in a cron as in a one-off."""
    with pytest.raises(InvalidTriggerError, match=message):
        Cron("@daily", zone)
    with pytest.raises(InvalidTriggerError, match=message.replace("expected an IANA name", "expected")):
        Once(datetime(2026, 1, 1), zone)


# --- Interval ---


def test_an_interval_begins_at_its_anchor() -> None:
    """Before the anchor there is nothing; the anchor is the first instant."""
    anchor = at("2026-01-01T00:00Z")

    found = first(Interval(timedelta(hours=1), anchor), "2020-01-01T00:00Z", 2)

    assert found == [anchor, anchor + timedelta(hours=1)]


def test_an_interval_is_exact_to_the_microsecond() -> None:
    """Fractions do not add up to a drift, however many steps lie between."""
    anchor = at("2026-01-01T00:00Z")
    every = timedelta(seconds=1) / 3

    found = Interval(every, anchor).next_after(anchor + 10_000_000 * every)

    assert found == anchor + 10_000_001 * every


def test_a_naive_anchor_is_the_machines_local_time(machine_in_new_york: None) -> None:
    """What datetime.now() gives can be an anchor."""
    assert Interval(timedelta(hours=1), datetime(2026, 1, 1)).anchor == at("2026-01-01T05:00Z")


@pytest.mark.parametrize("every", [timedelta(), timedelta(seconds=-1), MAX_INTERVAL + timedelta(microseconds=1)])
def test_an_interval_out_of_range_is_refused(every: timedelta) -> None:
    """An interval is more than nothing and at most a hundred years."""
    with pytest.raises(InvalidTriggerError, match="expected more than 0, at most 36525 days"):
        Interval(every, datetime(2026, 1, 1, tzinfo=UTC))


def test_an_interval_of_a_bare_number_is_refused() -> None:
    """A number would leave open whether it means seconds or minutes."""
    with pytest.raises(InvalidTriggerError, match="every=5: expected a timedelta"):
        Interval(5, datetime(2026, 1, 1, tzinfo=UTC))  # type: ignore[arg-type]


# --- Once ---


@pytest.mark.parametrize(
    ("wall", "expected"),
    [
        (datetime(2026, 3, 8, 2, 30), "2026-03-08T07:30Z"),
        (datetime(2026, 3, 8, 2, 30, fold=1), "2026-03-08T07:30Z"),
        (datetime(2026, 11, 1, 1, 30), "2026-11-01T05:30Z"),
        (datetime(2026, 11, 1, 1, 30, fold=1), "2026-11-01T06:30Z"),
        (datetime(2026, 6, 1, 12, 0, 0, 5), "2026-06-01T16:00:00.000005Z"),
    ],
    ids=["in a gap", "in a gap, fold=1", "first of two", "second of two", "plain"],
)
@pytest.mark.parametrize("how", ["by name", "by the machine", "aware"])
def test_a_one_off_resolves_its_time_on_the_wall(
    wall: datetime, expected: str, how: str, machine_in_new_york: None
) -> None:
    """Gaps move forward by the gap, fold picks among two; by name, by the machine's zone or the datetime's own."""
    match how:
        case "by name":
            once = Once(wall, "America/New_York")
        case "by the machine":
            once = Once(wall)
        case _:
            once = Once(wall.replace(tzinfo=NEW_YORK))

    assert once.at == at(expected)


def test_an_aware_one_off_keeps_its_own_offset() -> None:
    """The zone's name is for naive times only."""
    moment = datetime(2026, 6, 1, 12, tzinfo=timezone(timedelta(hours=2)))

    assert Once(moment, "America/New_York").at == at("2026-06-01T10:00Z")


def test_a_one_off_fires_one_time() -> None:
    """After its instant there is nothing."""
    once = Once(at("2026-06-01T00:00Z"))

    assert once.next_after(at("2026-05-31T23:59:59.999999Z")) == once.at
    assert once.next_after(once.at) is None


@pytest.mark.parametrize("bad", [date(2026, 1, 1), "2026-01-01", None])
def test_what_is_no_datetime_is_refused(bad: Any) -> None:
    """A date or a text is not an instant."""
    with pytest.raises(InvalidTriggerError, match="expected a datetime"):
        Once(bad)
    with pytest.raises(InvalidTriggerError, match="expected a datetime"):
        Interval(timedelta(1), bad)


def test_a_one_off_at_the_edge_of_the_calendar_is_refused() -> None:
    """A local time that has no UTC counterpart within the years 1 to 9999 is a clear error."""
    with pytest.raises(InvalidTriggerError, match="well within the years 1 to 9999"):
        Once(datetime.max, "America/New_York")


# --- all of them ---

ALL = [Cron("*/5 * * * *"), Interval(timedelta(minutes=5), at("2026-01-01T00:00Z")), Once(at("2026-01-01T00:00Z"))]


@pytest.mark.parametrize("trigger", ALL, ids=lambda trigger: type(trigger).__name__)
def test_naive_instants_are_refused(trigger: Trigger) -> None:
    """A naive instant could mean any zone, so it is an error and not a guess."""
    with pytest.raises(ValueError, match=r"naive datetime .*expected an aware one"):
        trigger.next_after(datetime(2026, 1, 1))


@pytest.mark.parametrize("trigger", ALL, ids=lambda trigger: type(trigger).__name__)
def test_triggers_are_values(trigger: Trigger) -> None:
    """They compare by what they say, can be hashed, copied and pickled, and do not change."""
    assert trigger == copy.deepcopy(trigger) == pickle.loads(pickle.dumps(trigger))
    assert len({trigger, copy.copy(trigger)}) == 1
    with pytest.raises(AttributeError):
        setattr(trigger, fields(trigger)[0].name, None)


@pytest.mark.parametrize(
    "trigger",
    [
        Cron("* * * * *", "Asia/Tokyo"),
        Cron("@daily", "America/New_York"),
        Interval(timedelta(1), at("2026-01-01T00:00Z")),
    ],
)
def test_past_the_end_of_the_calendar_nothing_fires(trigger: Trigger) -> None:
    """The last day of the year 9999 ends quietly."""
    assert trigger.next_after(datetime.max.replace(tzinfo=UTC)) is None


def test_rare_days_run_out_with_the_calendar() -> None:
    """An expression without another match before the year 10000 ends quietly too."""
    assert Cron("0 0 29 2 *").next_after(at("9997-01-01T00:00Z")) is None


# --- spans ---


def test_instants_are_those_after_the_start_up_to_and_with_the_end() -> None:
    """The start is not included, the end is."""
    found = list(instants(Cron("@hourly"), at("2026-01-01T00:00Z"), at("2026-01-01T03:00Z")))

    assert found == [at("2026-01-01T01:00Z"), at("2026-01-01T02:00Z"), at("2026-01-01T03:00Z")]


@pytest.mark.parametrize(
    ("limit", "count"),
    [(0, 0), (1, 1), (2, 2), (9, 3)],
)
def test_instants_stop_at_the_limit(limit: int, count: int) -> None:
    """No more than ``limit`` come out, the earliest."""
    found = list(instants(Cron("@hourly"), at("2026-01-01T00:00Z"), at("2026-01-01T03:00Z"), limit))

    assert found == [at("2026-01-01T00:00Z") + timedelta(hours=n + 1) for n in range(count)]


@pytest.mark.parametrize(
    ("trigger", "after", "until", "expected"),
    [
        (Cron("@hourly"), "2026-01-01T00:00Z", "2026-01-01T00:59Z", (None, 0)),
        (Cron("@hourly"), "2026-01-01T00:00Z", "2026-01-01T02:00Z", ("2026-01-01T02:00Z", 2)),
        (Cron("* * * * *"), "2020-01-01T00:00Z", "2026-01-01T00:00:30Z", ("2026-01-01T00:00Z", COUNT_LIMIT)),
        (Cron("* 0 1 1 *"), "2000-01-01T12:00Z", "2026-07-01T00:00Z", ("2026-01-01T00:59Z", COUNT_LIMIT)),
        (Once(at("2026-01-01T00:00Z")), "2025-01-01T00:00Z", "2026-01-01T00:00Z", ("2026-01-01T00:00Z", 1)),
        (Once(at("2026-01-01T00:00Z")), "2026-01-01T00:00Z", "2027-01-01T00:00Z", (None, 0)),
        (
            Interval(timedelta(seconds=1), at("2020-01-01T00:00Z")),
            "2020-01-01T00:00Z",
            "2021-01-01T00:00:00.5Z",
            ("2021-01-01T00:00Z", 366 * 86_400),
        ),
        (
            Interval(timedelta(hours=1), at("2026-01-01T00:00Z")),
            "2026-01-01T00:00Z",
            "2026-01-01T03:59Z",
            ("2026-01-01T03:00Z", 3),
        ),
    ],
)
def test_the_latest_instant_is_found_with_their_count(
    trigger: Trigger, after: str, until: str, expected: tuple[str | None, int]
) -> None:
    """The latest is the true one even where the count of a cron stops."""
    latest, count = latest_at_or_before(trigger, at(after), at(until))

    assert (latest, count) == (expected[0] and at(expected[0]), expected[1])


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (Cron("* * * * *"), ["2026-01-09T23:58Z", "2026-01-09T23:59Z", "2026-01-10T00:00Z"]),
        (Cron("0 0 1 * *"), ["2025-11-01T00:00Z", "2025-12-01T00:00Z", "2026-01-01T00:00Z"]),
        (Cron("0 0 25 12 *"), ["2025-12-25T00:00Z"]),
        (
            Interval(timedelta(microseconds=1), at("2026-01-01T00:00Z")),
            ["2026-01-09T23:59:59.999998Z", "2026-01-09T23:59:59.999999Z", "2026-01-10T00:00Z"],
        ),
        (Once(at("2025-06-01T00:00Z")), ["2025-06-01T00:00Z"]),
    ],
)
def test_the_latest_instants_come_in_order_and_without_the_earlier_ones(trigger: Trigger, expected: list[str]) -> None:
    """Of a long span, only its last instants are worked out."""
    found = latest_instants(trigger, at("2025-01-01T00:00Z"), at("2026-01-10T00:00Z"), 3)

    assert found == [at(text) for text in expected]
