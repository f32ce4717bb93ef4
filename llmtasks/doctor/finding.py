"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How much a finding hurts; the order is from worst to least."""

    #: Something does not work, or a promise does not hold.
    ERROR = "error"
    #: It will, when something else happens.
    WARNING = "warning"
    #: Worth to know.
    NOTE = "note"

    @property
    def rank(self) -> int:
        """0 is the worst."""
        return list(Severity).index(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that will bite.

    Attributes:
        code: Its name, which stays the same over versions.
        severity: How much it hurts.
        found: What was found, with the value.
        why: Why it matters, in one sentence.
        fix: What to type or set.
    """

    code: str
    severity: Severity
    found: str
    why: str
    fix: str
