"""Checks of the servers: that they answer, and how the broker keeps what it is given."""

from __future__ import annotations

from collections.abc import Iterator

from llmtasks import sender
from llmtasks.doctor.finding import Finding, Severity
from llmtasks.doctor.patient import Patient
from llmtasks.errors import BrokerUnavailableError, ConfigurationError, DatabaseUnavailableError, SchemaOutdatedError


def database(patient: Patient) -> Iterator[Finding]:
    """The database answers, and its tables are those of this version."""
    try:
        with patient.at.database.reading():
            pass
    except SchemaOutdatedError as error:
        yield Finding(
            code="schema-outdated",
            severity=Severity.ERROR,
            found=str(error).partition(":")[0],
            why="Workers do not start with tables of another version, and beats wait.",
            fix="celery llmtasks migrate",
        )
    except ConfigurationError as error:
        yield Finding(
            code="database-unusable",
            severity=Severity.ERROR,
            found=str(error),
            why="Without its database nothing is scheduled, and no run can begin or end.",
            fix="set LLMTASKS_DATABASE_URL to a sqlite://, postgresql:// or mysql:// URL",
        )
    except DatabaseUnavailableError as error:
        yield Finding(
            code="database-unreachable",
            severity=Severity.ERROR,
            found=str(error),
            why="Without its database nothing is scheduled, and no run can begin or end.",
            fix="start the server, or set LLMTASKS_DATABASE_URL to where it is",
        )


def broker(patient: Patient) -> Iterator[Finding]:
    """The broker answers."""
    try:
        with sender.answering(patient.at.app):
            pass
    except BrokerUnavailableError as error:
        yield Finding(
            code="broker-unreachable",
            severity=Severity.ERROR,
            found=str(error),
            why="No run reaches a worker: .delay() fails, and what is scheduled waits in the database.",
            fix="start the server (`llmtasks broker` the embedded one), or set LLMTASKS_BROKER_URL to where it is",
        )


def redis_eviction(patient: Patient) -> Iterator[Finding]:
    """A full Redis refuses messages and does not delete others."""
    server = patient.redis
    if server is None or server.policy in {None, "noeviction"}:
        return
    limit = f"maxmemory is {server.max_memory} bytes" if server.max_memory else "no maxmemory is set now"
    yield Finding(
        code="redis-eviction",
        severity=Severity.ERROR if server.max_memory else Severity.WARNING,
        found=f"the broker's maxmemory-policy is {server.policy!r}, {limit}",
        why="A Redis that is full deletes queues and results to make room, and says so to nobody.",
        fix="redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
    )


def redis_persistence(patient: Patient) -> Iterator[Finding]:
    """A Redis that is restarted has its messages again."""
    server = patient.redis
    if server is None or server.append_only:
        return
    if server.append_only is None or server.save is None:
        yield Finding(
            code="redis-persistence",
            severity=Severity.NOTE,
            found="the broker does not say whether it keeps its data (INFO or CONFIG GET is refused)",
            why="A restart of a Redis that keeps nothing loses the runs of .delay() that had not started.",
            fix="see to it that it is set to appendonly yes",
        )
    elif not server.save:
        yield Finding(
            code="redis-persistence",
            severity=Severity.WARNING,
            found="the broker has appendonly 'no' and save ''",
            why="A restart of it loses the runs of .delay() that had not started, and delays all others.",
            fix="redis-cli CONFIG SET appendonly yes, and the same in redis.conf",
        )
