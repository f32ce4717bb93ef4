"""Policies: what becomes of a schedule's instants that were missed, or that come while another run is unfinished."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from llmtasks.checks import check_choice, check_number, check_whole, instant_of
from llmtasks.errors import InvalidOptionError, InvalidTriggerError

#: An instant this many seconds late is a misfire.
DEFAULT_MISFIRE_GRACE: Final = 60.0
#: What the options of a schedule may say about its instants.
POLICY_NAMES: Final = ("overlap", "misfire", "misfire_grace", "misfire_window", "max_runs", "jitter_seconds")
#: Why a schedule is completed whose last instant passed.
REACHED_END: Final = "it reached its end"
#: How the reason of a run begins that jitter delays.
JITTERED: Final = "jitter: "


class Overlap(StrEnum):
    """What happens to an instant of a periodic schedule that comes while another run of it is unfinished."""

    #: It does not run.
    SKIP = "skip"
    #: It waits; while one waits, further ones do not run.
    QUEUE_ONE = "queue_one"
    #: It runs beside the others.
    ALLOW = "allow"
    #: The unfinished ones are cancelled, and it takes their place.
    CANCEL_RUNNING = "cancel_running"


class Misfire(StrEnum):
    """What happens to instants that nobody could dispatch in time."""

    #: The latest one runs and stands for all of them.
    ONCE = "once"
    #: None of them runs.
    SKIP = "skip"
    #: Each of them runs, the latest 1,000 within ``misfire_window``.
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """The policies of one schedule, with what its options leave out."""

    overlap: Overlap
    misfire: Misfire
    grace: timedelta
    window: timedelta | None
    max_runs: int | None
    jitter: timedelta

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Policies:
        """The policies that a schedule's options name."""
        grace, window = options.get("misfire_grace"), options.get("misfire_window")
        return cls(
            overlap=Overlap(options.get("overlap") or Overlap.SKIP),
            misfire=Misfire(options.get("misfire") or Misfire.ONCE),
            grace=timedelta(seconds=DEFAULT_MISFIRE_GRACE if grace is None else grace),
            window=None if window is None else timedelta(seconds=window),
            max_runs=options.get("max_runs"),
            jitter=timedelta(seconds=options.get("jitter_seconds") or 0),
        )

    def is_missed(self, instant: datetime, now: datetime) -> bool:
        """Whether an instant is too late to count as on time."""
        return now - instant > self.grace

    def jitter_of(self, run_id: str) -> timedelta:
        """The delay of a run: the same part of ``jitter`` wherever and however often it is computed."""
        # The first 32 bits of a run's id come from a hash of its schedule and instant (RFC 9562, version 5).
        return self.jitter * ((uuid.UUID(run_id).int >> 96) / 2**32)


def may_wait(options: Mapping[str, Any]) -> bool:
    """Whether an instant for which no place is free waits for one instead of being skipped."""
    return options.get("overlap") in {Overlap.QUEUE_ONE, Overlap.CANCEL_RUNNING}


def places_of(options: Mapping[str, Any], *, backfilled: bool = False) -> int | None:
    """How many runs of a schedule may run at once; None is no limit.

    A run that waits for those before it, or for those that are being cancelled, needs a place to wait for; so do
    backfilled ones, which would otherwise all begin at once.
    """
    given: int | None = options.get("max_instances")
    if given is None and (may_wait(options) or (backfilled and options.get("overlap") != Overlap.ALLOW)):
        return 1
    return given


def had_its_runs(options: Mapping[str, Any]) -> str:
    """Why a schedule is completed that ``max_runs`` lets run no more."""
    return f"max_runs: it had all of its {options.get('max_runs')}"


def check_policies(values: Mapping[str, Any]) -> None:
    """Check the options named in ``POLICY_NAMES``.

    Raises:
        InvalidOptionError: A value is wrong; it names the option, the value and what was expected.
    """
    check_choice("overlap", values.get("overlap"), Overlap)
    check_choice("misfire", values.get("misfire"), Misfire)
    check_number("misfire_grace", values.get("misfire_grace"), least=0)
    check_whole("max_runs", values.get("max_runs"), 1, None)
    check_number("jitter_seconds", values.get("jitter_seconds"), least=0)
    for name in ("misfire_grace", "jitter_seconds"):
        _check_span(name, values.get(name))
    window = values.get("misfire_window")
    if window is None:
        return
    seconds = seconds_of(window)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise InvalidOptionError("misfire_window", window, "a number of seconds above 0, or a timedelta")
    _check_span("misfire_window", seconds)
    if values.get("misfire") != Misfire.ALL:
        raise InvalidOptionError(
            "misfire_window", window, "a window only together with misfire='all'", "Other policies make up for nothing."
        )


def check_bounds(starts_at: object, ends_at: object) -> tuple[datetime | None, datetime | None]:
    """The first and the last moment in which a schedule may fire, in UTC.

    Raises:
        InvalidTriggerError: One is no datetime, or the end is before the start.
    """
    begin = None if starts_at is None else instant_of("starts_at", starts_at)
    end = None if ends_at is None else instant_of("ends_at", ends_at)
    if begin is not None and end is not None and begin > end:
        raise InvalidTriggerError(f"starts_at={begin.isoformat()}: expected not after ends_at, {end.isoformat()}")
    return begin, end


def seconds_of(span: Any) -> Any:
    """A span of time in seconds; what is no timedelta comes back as it is."""
    return span.total_seconds() if isinstance(span, timedelta) else span


def _check_span(option: str, seconds: float | None) -> None:
    try:
        timedelta(seconds=seconds or 0)
    except (OverflowError, ValueError):
        raise InvalidOptionError(option, seconds, "a number of seconds well below a million years") from None
