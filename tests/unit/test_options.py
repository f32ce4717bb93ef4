"""TaskOptions: what a decorator is given is checked at import, and every mistake names itself."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from llmtasks.errors import InvalidOptionError
from llmtasks.options import CELERY_OPTIONS, REFUSED_OPTIONS, TaskOptions, check_schedule_options, limits
from llmtasks.settings import TaskDefaults


def build(config: Any = None, **keywords: Any) -> TaskOptions:
    return TaskOptions.build("sync_emails", keywords, config)


def test_nothing_given_is_a_function_on_demand() -> None:
    """Every option has a default, and TASK_CONFIG decides the rest."""
    options = build()

    assert (options.name, options.priority, options.is_scheduled) == ("sync_emails", 5, False)
    assert options.celery_options() == {"name": "sync_emails", "acks_late": True, "serializer": "json"}
    resolved = options.with_defaults(TaskDefaults())
    assert (resolved.max_retries, resolved.retry_delay, resolved.soft_time_limit, resolved.time_limit) == (
        3,
        300,
        3600,
        3630,
    )


def test_keywords_and_config_mean_the_same() -> None:
    """Some here and some there give the same options as all in one place."""
    together = build(interval_minutes=5, priority=1, queue="mail", max_instances=2)

    assert build({"priority": 1, "queue": "mail"}, interval_minutes=5, max_instances=2) == together
    assert together.is_scheduled
    assert together.queue == "mail"


def test_given_options_win_over_task_config() -> None:
    """Zero is a value, not an absence."""
    resolved = build(max_retries=0, retry_delay=0, timeout=10).with_defaults(TaskDefaults())

    assert (resolved.max_retries, resolved.retry_delay) == (0, 0)
    assert (resolved.soft_time_limit, resolved.time_limit) == limits(10) == (10, 40)


def test_limits_of_celery_are_taken_as_they_are() -> None:
    """One that is given does not bring a default of ours for the other."""
    soft = build(soft_time_limit=5).with_defaults(TaskDefaults())
    hard = build(time_limit=9).with_defaults(TaskDefaults())

    assert (soft.soft_time_limit, soft.time_limit) == (5, None)
    assert (hard.soft_time_limit, hard.time_limit) == (None, 9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"interval_minutes": 0}, "interval_minutes=0: expected a number above 0"),
        ({"interval_minutes": "5"}, "interval_minutes='5': expected a number above 0"),
        ({"interval_minutes": True}, "interval_minutes=True: expected a number"),
        ({"interval_minutes": float("inf")}, "interval_minutes=inf: expected a number"),
        ({"interval_minutes": float("nan")}, "interval_minutes=nan: expected a number"),
        ({"interval_minutes": 5, "schedule": "* * * * *"}, "either interval_minutes or schedule, not both"),
        ({"schedule": 5}, "schedule=5: expected a cron expression"),
        ({"schedule": "* * * * *", "timezone": 1}, "timezone=1: expected the name of a zone"),
        ({"timeout": 0}, "timeout=0: expected a number above 0"),
        ({"timeout": -1}, "timeout=-1: expected"),
        ({"timeout": 5, "time_limit": 9}, "timeout=5: expected either timeout or Celery's own limits"),
        ({"max_retries": -1}, "max_retries=-1: expected a whole number from 0"),
        ({"max_retries": 1.5}, "max_retries=1.5: expected a whole number"),
        ({"max_retries": True}, "max_retries=True: expected a whole number"),
        ({"retry_delay": -0.1}, "retry_delay=-0.1: expected a number from 0"),
        ({"retry_backoff": 1}, "retry_backoff=1: expected True or False"),
        ({"priority": 0}, "priority=0: expected a whole number from 1 to 10. 1 runs first, 10 last."),
        ({"priority": 11}, "priority=11: expected"),
        ({"priority": "high"}, "priority='high': expected"),
        ({"max_instances": 0}, "max_instances=0: expected a whole number from 1"),
        ({"max_concurrency": 0}, "max_concurrency=0: expected a whole number from 1"),
        ({"max_concurrency": 1.5}, "max_concurrency=1.5: expected a whole number"),
        ({"misfire": "never"}, "misfire='never': expected one of 'once', 'skip', 'all'"),
        ({"misfire_grace": -1}, "misfire_grace=-1: expected a number from 0"),
        (
            {"max_runs": 3},
            "max_runs=3: expected a value only together with interval_minutes or schedule. A Task has its",
        ),
        ({"jitter_seconds": 3}, "jitter_seconds=3: expected a value only together with interval_minutes or schedule"),
        ({"queue": ""}, "queue='': expected the name of a queue"),
        ({"queue": 5}, "queue=5: expected the name of a queue"),
        ({"queue": "q" * 201}, "expected the name of a queue, up to 200 characters"),
        ({"on_failure": "notify"}, "on_failure='notify': expected a function"),
        ({"on_success": 5}, "on_success=5: expected a function"),
        ({"redact": "password"}, "redact='password': expected a tuple of parameter names"),
        ({"redact": (1,)}, "redact=.*: expected a tuple of parameter names"),
        ({"redact": None}, "redact=None: expected a tuple of parameter names"),
        ({"ledger": "never"}, "ledger='never': expected 'on' or 'off'"),
        ({"ledger": None}, "ledger=None: expected 'on' or 'off'"),
        ({"ledger": "off", "max_instances": 2}, "ledger='off': expected 'on' together with max_instances=2"),
        ({"ledger": "off", "unique": "id"}, "ledger='off': expected 'on' together with unique='id'"),
        ({"ledger": "off", "interval_minutes": 1}, "expected 'on' together with interval_minutes=1"),
        ({"ledger": "off", "schedule": "* * * * *"}, "expected 'on' together with schedule="),
        ({"ledger": "off", "on_failure": print}, "expected 'on' together with on_failure="),
        ({"ledger": "off", "on_success": print}, "expected 'on' together with on_success="),
        ({"ledger": "off", "redact": ("key",)}, "expected 'on' together with redact="),
        ({"acks_late": False}, "acks_late=False: expected True. A message acknowledged before"),
        ({"serializer": "pickle"}, "serializer='pickle': expected 'json'"),
        ({"max_retry": 5}, "max_retry=5: expected a known option. Did you mean 'max_retries'"),
        ({"zzzzz": 5}, "zzzzz=5: expected a known option$"),
        ({"config": 5}, "config=5: expected a dict of options"),
        ({"config": {"name": "x"}}, r"Write register\(name='x'\)"),
        ({"config": {5: "x"}}, "5='x': expected a known option"),
        ({"config": {"priority": 1}, "priority": 1}, "priority=1: expected the option in one place"),
    ],
    ids=str,
)
def test_mistake_is_named(given: dict[str, Any], message: str) -> None:
    """The option as it was written, its value, what was expected, what to do."""
    with pytest.raises(InvalidOptionError, match=message):
        build(**given)


@pytest.mark.parametrize("name", ["", "x" * 201, "a\0b", None, 5])
def test_name_is_a_text_that_fits(name: Any) -> None:
    """The ledger's columns end somewhere."""
    with pytest.raises(InvalidOptionError, match="name="):
        TaskOptions.build(name, {}, None)


@pytest.mark.parametrize("option", sorted(REFUSED_OPTIONS))
def test_option_that_breaks_a_promise_is_refused(option: str) -> None:
    """With the reason, in config too."""
    with pytest.raises(InvalidOptionError, match=f"{option}=1: expected no such option") as caught:
        build({option: 1})

    assert REFUSED_OPTIONS[option].casefold() in str(caught.value).casefold()


@pytest.mark.parametrize("option", sorted(CELERY_OPTIONS - {"serializer"}))
def test_options_of_celery_pass_through(option: str) -> None:
    """What is Celery's own stays so."""
    assert build(**{option: 7}).celery_options()[option] == 7


def test_useless_but_true_options_are_let_pass() -> None:
    """Saying what is so anyway is no mistake."""
    options = build(acks_late=True, serializer="json", misfire="skip", interval_minutes=0.5)

    assert options.celery_options()["acks_late"] is True
    assert (options.misfire, options.interval_minutes) == ("skip", 0.5)


def test_backoff_is_told_to_celery_too() -> None:
    """Its autoretry_for reads it."""
    assert build(retry_backoff=True).celery_options()["retry_backoff"] is True


def test_redacted_names_are_kept_as_a_tuple() -> None:
    """Whatever collection they came in."""
    assert build(redact=["password", "token"]).redact == ("password", "token")


def test_options_are_a_value() -> None:
    """Nobody changes them after they were checked."""
    with pytest.raises(FrozenInstanceError):
        build().priority = 1  # type: ignore[misc]


def test_options_of_a_task_are_checked_by_the_same_rules() -> None:
    """A Task's None means that its function decides."""
    check_schedule_options({"priority": None, "timeout": None, "interval_minutes": 1})
    with pytest.raises(InvalidOptionError, match="priority=11"):
        check_schedule_options({"priority": 11})
