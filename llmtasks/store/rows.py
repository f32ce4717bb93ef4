"""The tables. One row type per idea of the design."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Double,
    Index,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    literal_column,
    text,
)

from llmtasks.states import RunState
from llmtasks.store.columns import LongText, UtcDateTime

#: The revision in migrations/versions that creates exactly these tables.
SCHEMA_VERSION: Final = "0006"
VERSION_TABLE: Final = "llmtasks_version"
#: The conditions of partial indexes are in the migrations only: here they would load every dialect at import.
metadata: Final = MetaData()


schedules: Final = Table(
    "llmtasks_schedules",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("app", String(100), nullable=False),
    Column("name", String(200), nullable=False),
    #: "app:name" of a schedule declared in code, which is unique; NULL for those created by Task.
    Column("declared_key", String(301), unique=True),
    Column("func_name", String(200), nullable=False),
    Column("args", LongText, nullable=False),
    Column("kwargs", LongText, nullable=False),
    #: once, interval or cron.
    Column("kind", String(10), nullable=False),
    Column("expression", String(1000)),
    Column("timezone", String(64)),
    Column("every_us", BigInteger),
    #: The grid's origin of an interval, the instant of a one-off.
    Column("anchor", UtcDateTime),
    #: JSON object: priority, timeout, max_retries, max_instances, queue and the policies, as given.
    Column("options", LongText, nullable=False),
    Column("state", String(12), nullable=False),
    Column("reason", LongText),
    #: NULL unless the schedule is active and will fire.
    Column("next_run_at", UtcDateTime),
    Column("last_run_at", UtcDateTime),
    Column("starts_at", UtcDateTime),
    Column("ends_at", UtcDateTime),
    #: Runs that its instants got, which max_runs limits.
    Column("fired", Integer, nullable=False, server_default=text("0")),
    #: The function is a plain Celery task of the app's own: its runs end when they are published.
    Column("handed", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    #: Since when it is paused; NULL in every other state.
    Column("paused_at", UtcDateTime),
    # Only a schedule with a next run is in this index, whatever the table's size.
    Index("ix_llmtasks_schedules_due", "app", "next_run_at"),
    Index("ix_llmtasks_schedules_name", "app", "name"),
    # Only what code declares is in this one, in the order in which beats read it again and again.
    Index("ix_llmtasks_schedules_declared", "app", "name", "created_at"),
)

runs: Final = Table(
    "llmtasks_runs",
    metadata,
    #: Celery's task id.
    Column("id", String(255), primary_key=True),
    Column("app", String(100), nullable=False),
    Column("func_name", String(200), nullable=False),
    Column("name", String(200), nullable=False),
    Column("schedule_id", String(36)),
    Column("scheduled_for", UtcDateTime),
    Column("state", String(12), nullable=False),
    Column("reason", LongText),
    Column("args", LongText),
    Column("kwargs", LongText),
    #: JSON object with what sending the message again needs beside args and kwargs; NULL once delivered.
    Column("envelope", LongText),
    Column("queue", String(200)),
    Column("priority", Integer, nullable=False),
    #: max_instances of the function and of the schedule; NULL is no limit.
    Column("function_slots", Integer),
    Column("schedule_slots", Integer),
    #: Attempts that ended and count.
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    #: How many of them were lost with their worker.
    Column("losses", Integer, nullable=False, server_default=text("0")),
    #: NULL until a worker that knows the function claims the run.
    Column("max_retries", Integer),
    Column("retry_delay", Double),
    Column("next_attempt_at", UtcDateTime),
    #: Raised by every claim; fences every later write of that claim.
    Column("claim_no", Integer, nullable=False, server_default=text("0")),
    Column("owner", String(80)),
    Column("heartbeat_at", UtcDateTime),
    Column("worker", String(200)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("published_at", UtcDateTime),
    Column("publications", Integer, nullable=False, server_default=text("0")),
    Column("started_at", UtcDateTime),
    Column("attempt_started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    #: Seconds of the last attempt.
    Column("run_seconds", Double),
    Column("cpu_seconds", Double),
    #: Bytes.
    Column("peak_memory", BigInteger),
    Column("result", LongText),
    #: One line: the error's type and message.
    Column("error", LongText),
    #: JSON: the error as Celery's backends keep it, to raise it again.
    Column("failure", LongText),
    Column("traceback", LongText),
    #: The end has reached Celery: result stored, links and chord told. False while the run is live.
    Column("delivered", Boolean, nullable=False),
    #: When the keeper last sent the end for delivery.
    Column("delivery_sent_at", UtcDateTime),
    Column("callback_calls", Integer, nullable=False, server_default=text("0")),
    Column("cancel_requested_at", UtcDateTime),
    #: How many missed instants this run stands for, itself included.
    Column("stands_for", Integer, nullable=False, server_default=text("1")),
    #: Somebody asked for this instant afterwards: the overlap policy neither counts nor touches it.
    #: Its default is spelled as every database takes it and says it back.
    Column("backfilled", Boolean, nullable=False, server_default=text("'0'")),
    #: JSON of the signature that takes this run's place until it is published.
    Column("replacement", LongText),
    # One run for each instant. The migration leaves rows out of indexes that hold nothing for them: claims write less.
    Index("uq_llmtasks_runs_instant", "schedule_id", "scheduled_for", unique=True),
    # What keepers look at: rows leave this index for ever when their end is delivered. MariaDB's keeps them.
    Index("ix_llmtasks_runs_open", "app", "delivered", "state"),
    # Only what beat's ticks ask for is in this one, or in front: runs of schedules, until their end is delivered.
    Index("ix_llmtasks_runs_unfinished", "schedule_id", "delivered"),
    Index("ix_llmtasks_runs_created", "app", "created_at"),
    Index("ix_llmtasks_runs_ended", "app", "ended_at"),
)

outbox: Final = Table(
    "llmtasks_outbox",
    metadata,
    Column("run_id", String(255), primary_key=True),
    Column("app", String(100), nullable=False),
    #: Whether the message is for running the function or for telling Celery an end ("deliver").
    Column("kind", String(10), nullable=False),
    #: Nobody publishes it before; taking a message moves this on, so that a dead relay's work is taken over.
    Column("available_at", UtcDateTime, nullable=False),
    Index("ix_llmtasks_outbox_available", "app", "available_at"),
)

slots: Final = Table(
    "llmtasks_slots",
    metadata,
    #: "function:app:name" or "schedule:id".
    Column("scope", String(320), primary_key=True),
    #: 0 .. max_instances - 1: the primary key is what makes the limit hold.
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("run_id", String(255), nullable=False),
    Column("taken_at", UtcDateTime, nullable=False),
    Index("ix_llmtasks_slots_run", "run_id"),
)

unique: Final = Table(
    "llmtasks_unique",
    metadata,
    #: SHA-256 of app, function and arguments; of many that come at once the primary key lets one be the first.
    Column("key", String(64), primary_key=True),
    #: The run that was accepted last for the key. Whether it still counts is written in its own row, so nothing has to
    #: be cleared when it ends, however that happens.
    Column("run_id", String(255), nullable=False),
    Index("ix_llmtasks_unique_run", "run_id"),
)

pauses: Final = Table(
    "llmtasks_pauses",
    metadata,
    Column("app", String(100), primary_key=True),
    #: "function" or "queue".
    Column("kind", String(10), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("paused_at", UtcDateTime, nullable=False),
    Column("paused_by", String(200)),
    Column("reason", LongText),
)

processes: Final = Table(
    "llmtasks_processes",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("app", String(100), nullable=False),
    #: worker or beat.
    Column("kind", String(10), nullable=False),
    Column("name", String(200), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("pool", String(100)),
    Column("concurrency", Integer),
    Column("started_at", UtcDateTime, nullable=False),
    Column("heartbeat_at", UtcDateTime, nullable=False),
    Column("cpu_percent", Double),
    #: Bytes, children included.
    Column("memory", BigInteger),
    #: JSON list: the names of code-declared schedules that this beat knows.
    Column("declared", LongText),
    #: JSON list: the names of the task functions that this process can run, or, a beat, can fire.
    Column("functions", LongText),
    #: Seconds by which the clock of its host is ahead of the database's.
    Column("clock_offset", Double),
)


#: What ended in one hour, by function and state; summed once, when the hour is over.
totals: Final = Table(
    "llmtasks_totals",
    metadata,
    Column("app", String(100), primary_key=True),
    Column("hour", UtcDateTime, primary_key=True),
    Column("func_name", String(200), primary_key=True),
    Column("state", String(12), primary_key=True),
    Column("runs", Integer, nullable=False),
    #: Attempts after the first.
    Column("retries", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    #: Of the last attempts together, and how many of them were timed.
    Column("run_seconds", Double, nullable=False),
    Column("timed", Integer, nullable=False),
)

summed: Final = Table(
    "llmtasks_summed",
    metadata,
    Column("app", String(100), primary_key=True),
    #: All hours before this one are in the totals.
    Column("until", UtcDateTime, nullable=False),
)


def state_in(states: Iterable[RunState]) -> ColumnElement[bool]:
    """Whether a run is in one of ``states``, spelled out: a bound list cannot be used with many rows of parameters."""
    return runs.c.state.in_([literal_column(f"'{state}'") for state in sorted(states)])


def values_of(row: RowMapping) -> dict[str, Any]:
    """The values of a row by their columns' names."""
    return {str(name): value for name, value in row.items()}
