"""Beat schedulers to measure side by side: one class each, with the same few methods."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.schedulers.ours import Ours
from benchmarks.schedulers.persistent import Persistent
from benchmarks.schedulers.redbeat import RedBeat
from benchmarks.schedulers.scheduler import Scheduler
from benchmarks.schedulers.sqlalchemy_celery_beat import SqlalchemyCeleryBeat

OURS: dict[str, Callable[..., Scheduler]] = {
    f"llmtasks-{kind}": partial(Ours, kind) for kind in ("sqlite", "postgresql")
}
PEERS: dict[str, Callable[..., Scheduler]] = {
    "persistent": Persistent,
    **{f"sqlalchemy-celery-beat-{kind}": partial(SqlalchemyCeleryBeat, kind) for kind in ("sqlite", "postgresql")},
    "redbeat": RedBeat,
}
SCHEDULERS = {**OURS, **PEERS}


def add_options(parser: argparse.ArgumentParser) -> None:
    """How to choose among them."""
    parser.add_argument("--scheduler", choices=SCHEDULERS, action="append", metavar="NAME", help=", ".join(SCHEDULERS))
    parser.add_argument("--peers", action="store_true", help="with --quick: all of them, not llmtasks alone")


def chosen(options: argparse.Namespace) -> list[str]:
    """The names that a command line asks for."""
    named: Any = options.scheduler
    return list(named or (OURS if options.quick and not options.peers else SCHEDULERS))
