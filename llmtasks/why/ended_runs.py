"""How a run ended, and whether Celery knows."""

from __future__ import annotations

from llmtasks.states import RunState
from llmtasks.store.runs import Run
from llmtasks.store.standing import Standing
from llmtasks.why.explanation import Fact, Reason
from llmtasks.why.scene import Scene
from llmtasks.wording import counted, duration, utc


def ended(scene: Scene, run: Run, stands: Standing) -> Reason:
    """How a run ended; of an end that Celery does not know yet, what is in the way."""
    facts: list[Fact] = []
    when = ""
    if run.ended_at is not None:
        facts.append(Fact(name="ended", value=run.ended_at))
        when = f" at {utc(run.ended_at)}, {scene.ago(run.ended_at)}"
    if run.worker:
        facts.append(Fact(name="worker", value=run.worker))
    if run.run_seconds is not None:
        facts.append(Fact(name="took", value=duration(run.run_seconds)))
    answer = f"{_how(run)}{when}"
    said = run.error if run.state is RunState.FAILED else run.reason
    answer += f": {said or run.reason or run.error}" if said or run.reason or run.error else ""
    if run.delivered:
        return answer, facts
    if not run.func_name:
        return f"{answer}; nobody has sent it yet, and when it comes it does not start", facts
    untold, more = _untold(scene, stands)
    return f"{answer}; {untold}", [*facts, *more, *scene.broker_facts()]


def _how(run: Run) -> str:
    match run.state:
        case RunState.SUCCEEDED:
            return f"it succeeded in attempt {run.attempt}"
        case RunState.FAILED:
            return f"it failed after {counted(run.attempts, 'attempt')}"
        case RunState.SKIPPED:
            return "it was skipped"
        case _:
            return "it was cancelled"


def _untold(scene: Scene, stands: Standing) -> Reason:
    holds = stands.heartbeat_at is not None and scene.now - stands.heartbeat_at <= scene.at.settings.lease_time
    if stands.owner is not None and holds:
        return "its worker is telling Celery so", []
    facts = [Fact(name="told", value=f"{counted(stands.publications, 'time')}, in vain")]
    if stands.delivery_sent_at is None:
        return "Celery has not been told; a keeper sends it", facts if stands.publications else []
    facts.append(Fact(name="told last", value=stands.delivery_sent_at))
    why = ""
    if scene.broker_fault is not None:
        why = ": the broker does not answer"
    elif not scene.workers:
        why = ": no worker is alive"
    return f"Celery was told in vain {counted(stands.publications, 'time')}{why}", facts
