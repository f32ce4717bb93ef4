"""What ``explain`` gives: one sentence, and the facts that it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing that is known; an instant is aware, UTC."""

    name: str
    value: str | datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a Task or a run is not running, or when it will.

    Attributes:
        kind: "task" for a stored schedule, "run" for one execution.
        id: Its id.
        name: Its name.
        state: A ``ScheduleState`` or a ``RunState``; of a run that only Celery knows, Celery's state.
        answer: The answer in one sentence.
        facts: What it rests on, the most telling first.
    """

    kind: Literal["task", "run"]
    id: str
    name: str
    state: str
    answer: str
    facts: tuple[Fact, ...]


#: The answer and its facts.
Reason = tuple[str, list[Fact]]
