"""why: what keeps a Task or a run from running, or when it will run; for the command line and for pages."""

from __future__ import annotations

from llmtasks import sender
from llmtasks.dispatch import Station
from llmtasks.errors import BrokerUnavailableError, RunNotFoundError
from llmtasks.states import ENDED
from llmtasks.store import runs, schedules, standing
from llmtasks.store.runs import Run
from llmtasks.store.standing import Standing
from llmtasks.why.ended_runs import ended
from llmtasks.why.explanation import Explanation, Fact
from llmtasks.why.firing import explain_schedule
from llmtasks.why.live_runs import LIVE_REASONS
from llmtasks.why.scene import Scene

__all__ = ["Explanation", "Fact", "explain"]


def explain(at: Station, task_id: str) -> Explanation:
    """Say why a Task or a run is not running, or when it will. It writes nothing, and answers while the broker is away.

    Args:
        at: The app.
        task_id: The id of a Task or of a run.

    Raises:
        RunNotFoundError: Neither the ledger nor Celery knows the id.
        DatabaseUnavailableError: The ledger does not answer.
    """
    with at.database.reading() as connection:
        schedule = schedules.get(connection, task_id)
        run = runs.get(connection, task_id) if schedule is None else None
        stands = standing.standing(connection, task_id) if run is not None else None
    if schedule is not None:
        return explain_schedule(Scene(at), schedule)
    if run is not None and stands is not None:
        return _explain_run(Scene(at), run, stands)
    return _ask_celery(at, task_id)


def _explain_run(scene: Scene, run: Run, stands: Standing) -> Explanation:
    if run.state in ENDED:
        answer, facts = ended(scene, run, stands)
    else:
        answer, facts = LIVE_REASONS[run.state](scene, run, stands)
        if run.reason:
            facts.append(Fact(name="reason", value=run.reason))
        facts += [*scene.process_facts(), *scene.broker_facts()]
    return Explanation(
        kind="run",
        id=run.id,
        name=run.name,
        state=str(run.state),
        answer=f"run of {run.name!r}: {answer}" if run.name else answer,
        facts=(*facts, *_origin(run)),
    )


def _origin(run: Run) -> list[Fact]:
    facts = [Fact(name="created", value=run.created_at)]
    if run.schedule_id is not None:
        facts.append(Fact(name="task", value=run.schedule_id))
    if run.scheduled_for is not None:
        facts.append(Fact(name="scheduled for", value=run.scheduled_for))
    if run.stands_for > 1:
        facts.append(Fact(name="stands for", value=f"{run.stands_for} instants"))
    return facts


def _ask_celery(at: Station, run_id: str) -> Explanation:
    """What Celery says of an id that the ledger does not have."""
    unknown = f"no Task or run has the id {run_id!r}; a run of .delay() is in the ledger from its first start on"
    try:
        state = sender.celery_state_soon(at.app, run_id)
    except BrokerUnavailableError as error:
        raise RunNotFoundError(f"{unknown}. Celery cannot be asked: {error}") from error
    if state == "PENDING":
        raise RunNotFoundError(unknown)
    answer = f"it is not in the ledger; Celery says {state}"
    return Explanation(kind="run", id=run_id, name="", state=state, answer=answer, facts=())
