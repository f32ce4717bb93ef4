"""Checks of what is configured; they ask no server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from llmtasks import sender
from llmtasks.doctor.finding import Finding, Severity
from llmtasks.doctor.patient import Patient
from llmtasks.options import DEFAULT_PRIORITY
from llmtasks.registry import task_registry
from llmtasks.wording import duration, listed

#: What the kernel of Linux has mounted where.
MOUNTS: Final = Path("/proc/mounts")
#: File systems on which SQLite's locks, or the memory that its WAL shares, do not work between hosts.
NETWORK: Final = frozenset(
    {
        "9p", "afs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "lustre", "ncpfs", "nfs",
        "nfs4", "smb3", "smbfs",
    }
)  # fmt: skip


def visibility_timeout(patient: Patient) -> Iterator[Finding]:
    """Stock kombu hands out again what runs longer than its visibility timeout."""
    visibility = sender.stock_visibility(patient.at.app)
    if visibility is None:
        return
    limits = {name: options.time_limit or options.soft_time_limit or 0.0 for name, options in patient.functions.items()}
    longest = max(limits, key=lambda name: limits[name], default=None)
    if longest is not None and limits[longest] > visibility:
        yield Finding(
            code="visibility-timeout",
            severity=Severity.ERROR,
            found=f"visibility_timeout is {visibility:g} s, and {longest!r} may run for {limits[longest]:g} s "
            f"({duration(limits[longest])})",
            why="Redis hands out the message of a run that still runs: the copy is refused, but only the ledger holds "
            "the run from then on, and a task of the app's own runs twice.",
            fix=f"set broker_transport_options = {{'visibility_timeout': {int(limits[longest]) + 60}, ...}} "
            "for all processes, or register a shorter timeout",
        )


def pickle_accepted(patient: Patient) -> Iterator[Finding]:
    """Whoever can write to the broker runs code in workers that accept pickle."""
    for name, value in sender.pickle_settings(patient.at.app).items():
        instead = "'json'" if isinstance(value, str) else "['json']"
        yield Finding(
            code="pickle-accepted",
            severity=Severity.ERROR,
            found=f"{name} is {value!r}",
            why="Who can write to the broker or the result backend can run any code in the processes that read it.",
            fix=f"set {name} = {instead}",
        )


def transport_without_priorities(patient: Patient) -> Iterator[Finding]:
    """A priority means nothing to some transports."""
    transport = sender.transport_without_priorities(patient.at.app)
    if transport is None:
        return
    prior = [name for name in patient.functions if task_registry.options(name).priority != DEFAULT_PRIORITY]
    yield Finding(
        code="transport-without-priorities",
        severity=Severity.WARNING if prior else Severity.NOTE,
        found=f"the broker's transport is {transport!r}"
        + (f", and {listed(prior)} {'has a priority' if len(prior) == 1 else 'have priorities'}" if prior else ""),
        why="This transport has no priorities: runs start in the order in which they were sent.",
        fix="use Redis, Valkey or RabbitMQ (LLMTASKS_BROKER_URL), or give urgent functions a queue and worker of their "
        "own",
    )


def sqlite_on_network(patient: Patient, mounts: Path = MOUNTS) -> Iterator[Finding]:
    """SQLite trusts in locks that network file systems do not keep."""
    database = patient.at.database
    if not database.is_sqlite or not mounts.exists():
        return
    path = Path(str(database.url.database)).absolute()
    kind = file_system_of(path, mounts.read_text(errors="replace"))
    if kind in NETWORK:
        yield Finding(
            code="sqlite-on-network",
            severity=Severity.ERROR,
            found=f"the SQLite file {path} is on a file system of type {kind}",
            why="SQLite's locks and the memory that its processes share do not work there: rows get lost or the file "
            "is damaged.",
            fix="set LLMTASKS_HOME to a directory on a local disk, or LLMTASKS_DATABASE_URL to a PostgreSQL server",
        )


def file_system_of(path: Path, mounts: str) -> str | None:
    """The type of the file system that ``path`` is on.

    Args:
        path: A file or directory, which need not exist.
        mounts: A table as in ``/proc/mounts``.
    """
    real = path.resolve()
    found: tuple[int, str] | None = None
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        place = Path(fields[1].encode().decode("unicode_escape"))
        # Of two on one place the later one is on top.
        if real.is_relative_to(place) and (found is None or len(place.parts) >= found[0]):
            found = (len(place.parts), fields[2])
    return None if found is None else found[1]
