"""TaskOptions: the decorator's arguments, checked; the only module that knows Celery's option names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any, Final

from llmtasks.checks import check_ledger, check_number, check_text, check_whole
from llmtasks.errors import InvalidOptionError, nearest
from llmtasks.policies import DEFAULT_MISFIRE_GRACE, Misfire, Overlap, check_bounds, check_policies, seconds_of
from llmtasks.settings import TaskDefaults
from llmtasks.uniqueness import UniqueRule, rule_of

#: The priority of a run where nobody said one; 1 runs first, 10 last.
DEFAULT_PRIORITY: Final = 5
#: A run that ignores its timeout for this many seconds is ended by force (where the pool can).
HARD_LIMIT_MARGIN: Final = 30.0

#: Celery's own task options that go through as they are.
CELERY_OPTIONS: Final = frozenset(
    {
        "autoretry_for",
        "bind",
        "compression",
        "dont_autoretry_for",
        "expires",
        "ignore_result",
        "pydantic",
        "pydantic_context",
        "pydantic_dump_kwargs",
        "pydantic_strict",
        "rate_limit",
        "resultrepr_maxsize",
        "retry_backoff_max",
        "retry_jitter",
        "retry_kwargs",
        "send_events",
        "serializer",
        "soft_time_limit",
        "store_errors_even_if_ignored",
        "throws",
        "time_limit",
        "track_started",
        "trail",
        "typing",
    }
)
#: Celery options that would break a promise, and why.
REFUSED_OPTIONS: Final = {
    "acks_on_failure": "a run is acknowledged when its end is in the ledger",
    "acks_on_failure_or_timeout": "a run is acknowledged when its end is in the ledger",
    "acks_on_timeout": "a run is acknowledged when its end is in the ledger",
    "base": "registered functions have llmtasks' own Task class",
    "default_retry_delay": "write retry_delay",
    "reject_on_worker_lost": "a lost run is dispatched again from the ledger",
    "retry_on_worker_lost": "a lost run is dispatched again from the ledger",
    "shared": "registered functions are always shared among apps",
    "task_cls": "registered functions have llmtasks' own Task class",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What a task function was registered with. ``None`` means that ``TASK_CONFIG`` or a default decides.

    Attributes:
        name: The task function's name, Celery's task name.
        interval_minutes: Runs every so many minutes; fractions are allowed.
        schedule: Runs when this cron expression says.
        timezone: The zone of ``schedule``, an IANA name.
        max_retries: Attempts after the first.
        retry_delay: Seconds between attempts.
        retry_backoff: Attempts wait exponentially longer, with jitter, from 1 s up to Celery's ``retry_backoff_max``.
        timeout: Seconds that one attempt may take.
        priority: 1 (first) to 10 (last).
        max_instances: How many runs of this function may run at once, over all workers.
        max_concurrency: How many runs of this function may run at once in one worker; the others wait in it.
        overlap: What happens to an instant that comes while another run of the schedule is unfinished.
        misfire: What happens to instants that nobody could dispatch in time.
        misfire_grace: Seconds after which an instant counts as missed.
        misfire_window: Seconds, or a timedelta; misfire "all" runs no instant that is later than this.
        starts_at: No instant before this one runs.
        ends_at: No instant after this one runs.
        max_runs: After so many runs of its instants the schedule is completed.
        jitter_seconds: Each run of an instant is sent later by a part of this, which chance chooses once.
        unique: One run at a time: True compares all arguments, names of parameters compare these.
        unique_for: Seconds, or a timedelta; for so long after it was accepted a run counts although it has ended.
        unique_states: The states in which a run counts; None is all that are unfinished.
        on_duplicate: What becomes of another run meanwhile: "return" (None), "replace" or "refuse".
        queue: The Celery queue.
        on_failure: Called with (run, error) after the last attempt failed.
        on_success: Called with (run, result) after an attempt succeeded.
        redact: Names of parameters whose values the ledger hides once the run is over.
        ledger: "off" runs it as a plain Celery task, of which no database hears.
        celery: Celery's own task options.
    """

    name: str
    interval_minutes: float | None = None
    schedule: str | None = None
    timezone: str | None = None
    max_retries: int | None = None
    retry_delay: float | None = None
    retry_backoff: bool = False
    timeout: float | None = None
    priority: int = DEFAULT_PRIORITY
    max_instances: int | None = None
    max_concurrency: int | None = None
    overlap: str = Overlap.SKIP
    misfire: str = Misfire.ONCE
    misfire_grace: float = DEFAULT_MISFIRE_GRACE
    misfire_window: float | timedelta | None = None
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    max_runs: int | None = None
    jitter_seconds: float | None = None
    unique: bool | str | Iterable[str] = False
    unique_for: float | timedelta | None = None
    unique_states: Iterable[str] | None = None
    on_duplicate: str | None = None
    queue: str | None = None
    on_failure: Callable[..., Any] | None = None
    on_success: Callable[..., Any] | None = None
    redact: tuple[str, ...] = ()
    ledger: str = "on"
    celery: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = vars_of(self)  # what callers gave, whatever the annotations ask for
        check_text("name", given["name"], "a text of 1 to 200 characters")
        check_schedule_options(given)
        check_number("retry_delay", self.retry_delay, least=0)
        if not isinstance(given["retry_backoff"], bool):
            raise InvalidOptionError("retry_backoff", self.retry_backoff, "True or False")
        for name in ("on_failure", "on_success"):
            callback = given[name]
            if callback is not None and not callable(callback):
                raise InvalidOptionError(name, callback, "a function of (run, error) or (run, result)")
        names = given["redact"]
        if not isinstance(names, list | tuple | set | frozenset) or not all(isinstance(item, str) for item in names):
            raise InvalidOptionError("redact", names, "a tuple of parameter names")
        for name in ("misfire_window", "starts_at", "ends_at", "max_runs", "jitter_seconds"):
            if given[name] is not None and not self.is_scheduled:
                raise InvalidOptionError(
                    name, given[name], "a value only together with interval_minutes or schedule", "A Task has its own."
                )
        rule_of(given)
        check_ledger(given)
        begin, end = check_bounds(given["starts_at"], given["ends_at"])
        checked = {"redact": tuple(names), "misfire_window": seconds_of(self.misfire_window)}
        for name, value in {**checked, "starts_at": begin, "ends_at": end}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def build(cls, name: str, keywords: Mapping[str, Any], config: Any) -> TaskOptions:
        """Merge the decorator's keywords with its ``config`` mapping and check both.

        Raises:
            InvalidOptionError: A key is unknown or given twice, or a value is wrong.
        """
        if config is not None and not isinstance(config, Mapping):
            raise InvalidOptionError("config", config, "a dict of options")
        config = config or {}
        twice = [key for key in keywords if key in config]
        if twice:
            raise InvalidOptionError(
                twice[0],
                keywords[twice[0]],
                "the option in one place",
                "It is given as a keyword and in config: remove one.",
            )
        given = {**keywords, **config}
        own = {item.name for item in fields(cls)} - {"celery", "name"}
        if "name" in config:
            raise InvalidOptionError(
                "config", "name", "the name as a keyword", f"Write register(name={config['name']!r})."
            )
        for key, value in given.items():
            _check_known(key, value, own)
        celery = {key: value for key, value in given.items() if key in CELERY_OPTIONS}
        if "timeout" in given and given["timeout"] is not None and ({"time_limit", "soft_time_limit"} & set(celery)):
            raise InvalidOptionError("timeout", given["timeout"], "either timeout or Celery's own limits, not both")
        if celery.get("serializer", "json") != "json":
            raise InvalidOptionError(
                "serializer", celery["serializer"], "'json'", "Arguments and results are kept in SQL as JSON."
            )
        return cls(name=name, celery=celery, **{key: value for key, value in given.items() if key in own})

    @property
    def is_scheduled(self) -> bool:
        """Whether beat runs the function by itself."""
        return self.interval_minutes is not None or self.schedule is not None

    @property
    def unique_rule(self) -> UniqueRule | None:
        """Which of the function's runs are the same, and what becomes of a second one; None where any may be."""
        return (
            rule_of(
                {
                    "unique": self.unique,
                    "unique_for": self.unique_for,
                    "unique_states": self.unique_states,
                    "on_duplicate": self.on_duplicate,
                }
            )
            if self.unique
            else None
        )

    def celery_options(self) -> dict[str, Any]:
        """Keyword arguments of Celery's ``shared_task``, without what only ``TASK_CONFIG`` knows."""
        options: dict[str, Any] = {**self.celery, "name": self.name, "acks_late": True, "serializer": "json"}
        if self.retry_backoff:
            options["retry_backoff"] = True  # read by Celery's autoretry_for
        return options

    def with_defaults(self, defaults: TaskDefaults) -> ResolvedOptions:
        """The numbers in force once ``TASK_CONFIG`` is known."""
        timeout = defaults.default_timeout if self.timeout is None else self.timeout
        soft, hard = limits(timeout)
        return ResolvedOptions(
            max_retries=defaults.max_retries if self.max_retries is None else self.max_retries,
            retry_delay=defaults.retry_delay if self.retry_delay is None else self.retry_delay,
            soft_time_limit=self.celery.get("soft_time_limit", None if "time_limit" in self.celery else soft),
            time_limit=self.celery.get("time_limit", None if "soft_time_limit" in self.celery else hard),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedOptions:
    """Options after ``TASK_CONFIG``. Limits and delays in seconds."""

    max_retries: int
    retry_delay: float
    soft_time_limit: float | None
    time_limit: float | None


def limits(timeout: float) -> tuple[float, float]:
    """Celery's (soft, hard) time limits for a timeout: the function is told first, and ended by force 30 s later."""
    return timeout, timeout + HARD_LIMIT_MARGIN


def check_schedule_options(values: Mapping[str, Any]) -> None:
    """Check the options that a registration and a Task have in common.

    Raises:
        InvalidOptionError: A value is wrong; it names the option, the value and what was expected.
    """
    interval, schedule = values.get("interval_minutes"), values.get("schedule")
    if interval is not None and schedule is not None:
        raise InvalidOptionError(
            "interval_minutes", interval, "either interval_minutes or schedule, not both", f"schedule is {schedule!r}."
        )
    check_number("interval_minutes", interval, above=0)
    if schedule is not None and not isinstance(schedule, str):
        raise InvalidOptionError("schedule", schedule, 'a cron expression such as "0 0 * * *"')
    timezone = values.get("timezone")
    if timezone is not None and not isinstance(timezone, str):
        raise InvalidOptionError("timezone", timezone, 'the name of a zone such as "Europe/Berlin"')
    check_number("timeout", values.get("timeout"), above=0)
    check_whole("max_retries", values.get("max_retries"), 0, None)
    check_whole("priority", values.get("priority"), 1, 10)
    for name in ("max_instances", "max_concurrency"):
        check_whole(name, values.get(name), 1, None)
    check_policies(values)
    queue = values.get("queue")
    if queue is not None:
        check_text("queue", queue, "the name of a queue, up to 200 characters")


def vars_of(options: TaskOptions) -> dict[str, Any]:
    """The fields of ``options`` by name (a slotted class has no ``vars``)."""
    return {item.name: getattr(options, item.name) for item in fields(options)}


def _check_known(key: str, value: object, own: set[str]) -> None:
    """Raise for an option that nobody knows or that breaks a promise."""
    if key == "acks_late":
        if value is not True:
            raise InvalidOptionError(
                "acks_late", value, "True", "A message acknowledged before its run ends would be lost with its worker."
            )
        return
    if key in REFUSED_OPTIONS:
        raise InvalidOptionError(
            key, value, "no such option for a registered function", f"{REFUSED_OPTIONS[key].capitalize()}."
        )
    if key not in own and key not in CELERY_OPTIONS:
        near = nearest(str(key), own | CELERY_OPTIONS)
        raise InvalidOptionError(key, value, "a known option", f"Did you mean {near[0]!r}?" if near else "")
