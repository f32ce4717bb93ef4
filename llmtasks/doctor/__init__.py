"""doctor: reads the live configuration and the servers, and says what will bite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from llmtasks.dispatch import Station
from llmtasks.doctor import configuration, living, servers, work
from llmtasks.doctor.finding import Finding, Severity
from llmtasks.doctor.patient import Patient
from llmtasks.errors import LLMTasksError, UnavailableError

__all__ = ["CHECKS", "Check", "Finding", "NotRun", "Patient", "Report", "Severity", "examine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question to the patient; no finding is a good answer.

    Attributes:
        name: Its name, which stays the same over versions.
        ask: The check.
        needs: The checks of the servers that it asks.
    """

    name: str
    ask: Callable[[Patient], Iterator[Finding]]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRun:
    """A check without an answer. ``failed``: by its own fault; else a server that it needs is away."""

    check: str
    reason: str
    failed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What all checks found, the worst first."""

    findings: tuple[Finding, ...]
    #: Names of the checks that found nothing.
    passed: tuple[str, ...]
    not_run: tuple[NotRun, ...]

    def has(self, severity: Severity) -> bool:
        """Whether anything is as bad as ``severity``, or worse."""
        return any(finding.severity.rank <= severity.rank for finding in self.findings)


DATABASE: Final = "database"
BROKER: Final = "broker"
#: In this order: whether the servers answer comes before what asks them.
CHECKS: Final = (
    Check(name="pickle-accepted", ask=configuration.pickle_accepted),
    Check(name="visibility-timeout", ask=configuration.visibility_timeout),
    Check(name="transport-without-priorities", ask=configuration.transport_without_priorities),
    Check(name="sqlite-on-network", ask=configuration.sqlite_on_network),
    Check(name=DATABASE, ask=servers.database),
    Check(name=BROKER, ask=servers.broker),
    Check(name="redis-eviction", ask=servers.redis_eviction, needs=(BROKER,)),
    Check(name="redis-persistence", ask=servers.redis_persistence, needs=(BROKER,)),
    Check(name="no-beat", ask=living.no_beat, needs=(DATABASE,)),
    Check(name="no-worker", ask=living.no_worker, needs=(DATABASE,)),
    Check(name="clock-skew", ask=living.clock_skew, needs=(DATABASE,)),
    Check(name="cannot-interrupt", ask=living.cannot_interrupt, needs=(DATABASE, BROKER)),
    Check(name="queue-without-consumer", ask=work.queue_without_consumer, needs=(DATABASE, BROKER)),
    Check(name="function-unknown", ask=work.function_unknown, needs=(DATABASE,)),
    Check(name="paused", ask=work.paused, needs=(DATABASE,)),
    Check(name="schedule-set-aside", ask=work.set_aside, needs=(DATABASE,)),
    Check(name="end-untold", ask=work.end_untold, needs=(DATABASE,)),
)


def examine(at: Station, say: Callable[[str], object] = lambda _: None, checks: Iterable[Check] = CHECKS) -> Report:
    """Ask every check. Returns always, and within seconds: a server that is away is a finding.

    Args:
        at: The app; the modules that register its functions have been imported.
        say: Told the name of each check when it begins.
        checks: The checks, those of servers first.
    """
    patient = Patient(at)
    findings: list[Finding] = []
    passed: list[str] = []
    not_run: list[NotRun] = []
    away: set[str] = set()
    for check in checks:
        missing = [name for name in check.needs if name in away]
        if missing:
            reason = f"the {' and the '.join(missing)} cannot be asked"
            not_run.append(NotRun(check=check.name, reason=reason, failed=False))
            continue
        say(check.name)
        try:
            found = list(check.ask(patient))
        except Exception as error:  # a fault in one check hides no other's answer
            reason = str(error) if isinstance(error, LLMTasksError) else f"{type(error).__name__}: {error}"
            not_run.append(NotRun(check=check.name, reason=reason, failed=True))
            away |= {check.name, *(check.needs if isinstance(error, UnavailableError) else ())}
            continue
        findings += found
        if found:
            away.add(check.name)
        else:
            passed.append(check.name)
    findings.sort(key=lambda finding: finding.severity.rank)
    return Report(findings=tuple(findings), passed=tuple(passed), not_run=tuple(not_run))
