"""Why a run that has not ended does not go on, state by state."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Final

from llmtasks import sender
from llmtasks.states import PauseKind, RunState
from llmtasks.store import slots, standing
from llmtasks.store.runs import Run
from llmtasks.store.standing import Standing
from llmtasks.why.explanation import Fact, Reason
from llmtasks.why.scene import Scene
from llmtasks.wording import counted, duration, listed, utc

#: What keepers do is done by any worker or beat.
_NOBODY: Final = "no worker or beat is alive"


def pending(scene: Scene, run: Run, stands: Standing) -> Reason:
    """Its message is in the outbox."""
    facts = _sent(stands)
    if not stands.publications:  # later ones leave no trace of when they were owed
        facts.insert(0, Fact(name="in the outbox since", value=run.created_at))
    patience = timedelta(seconds=scene.at.settings.outbox_patience)
    if stands.available_at is not None and stands.available_at > scene.now + patience:
        facts.insert(0, Fact(name="starts at", value=stands.available_at))
        answer = f"it was asked for at {utc(stands.available_at)}, {scene.until(stands.available_at)}"
        return answer + ("" if scene.alive else f", and {_NOBODY} to send it then"), facts
    if scene.broker_fault is not None:
        return "its message waits in the outbox: the broker does not answer", facts
    if not scene.alive:
        return f"its message waits in the outbox, and {_NOBODY} to send it", facts
    return "its message is in the outbox and about to be sent" + _unless_worker(scene, run), facts


def queued(scene: Scene, run: Run, stands: Standing) -> Reason:
    """The broker has its message."""
    queue = sender.queue_of(scene.at.app, run.func_name, run.queue)
    facts = [Fact(name="queue", value=queue)]
    if run.queue is None and run.func_name not in scene.at.app.tasks:
        facts.append(
            Fact(name="perhaps another", value=f"{run.func_name!r} is not imported here and may name its queue")
        )
    if stands.published_at is not None:
        facts.append(Fact(name="queued since", value=stands.published_at))
    facts += _sent(stands)
    if scene.broker_fault is not None:
        return f"it was sent to queue {queue!r}, and the broker does not answer now", facts
    messages = scene.messages_in(queue)
    if messages is not None:
        facts.append(Fact(name="messages in the queue", value=str(messages)))
    paused = scene.pause_of(PauseKind.QUEUE, queue)
    if paused is not None:
        return f"it is in queue {queue!r}: {paused}", facts
    if not scene.workers:
        return f"it is in queue {queue!r}, and no worker is alive", facts
    consumers = [name for name, queues in scene.consumed.items() if queue in queues]
    silent = [worker.name for worker in scene.workers if worker.name not in scene.consumed]
    facts.append(Fact(name="consumed by", value=listed(consumers) or "none that answers"))
    if silent:
        facts.append(Fact(name="do not answer", value=listed(silent)))
    if not consumers and not silent:
        return f"it is in queue {queue!r}, which no live worker consumes", facts
    if not consumers:
        return f"it is in queue {queue!r}; the live workers do not say what they consume: they are busy", facts
    able = [worker.name for worker in scene.workers if run.func_name in worker.functions and worker.name in consumers]
    if not able:
        return f"it is in queue {queue!r}, and no live worker that consumes it knows {run.func_name!r}", facts
    if messages == 0:
        return (
            f"queue {queue!r} is empty: a worker has fetched the message and is busy, or it was lost and is sent again",
            facts,
        )
    behind = "" if messages is None else f" with {counted(messages, 'message')}"
    return f"it waits in queue {queue!r}{behind}, which {listed(consumers)} consume{'s' * (len(consumers) == 1)}", facts


def waiting(scene: Scene, run: Run, stands: Standing) -> Reason:
    """There was no slot, or its function is paused."""
    paused = scene.pause_of(PauseKind.FUNCTION, run.func_name)
    if paused is not None:
        return f"{paused}; it starts when somebody resumes that", []
    scopes = slots.scopes(stands.app, run.func_name, stands.function_slots, run.schedule_id, stands.schedule_slots)
    facts: list[Fact] = []
    answer: str | None = None
    with scene.at.database.reading() as connection:
        for scope, places in scopes:
            holders = standing.holders(connection, scope)
            ahead = standing.before_in_line(connection, stands.app, run, scope)
            what = f"function {run.func_name!r}" if scope.startswith("function:") else f"schedule {run.name!r}"
            facts.append(Fact(name=f"slots of {what}", value=f"{len(holders)} of {places} taken"))
            for holder in holders:
                where = f" on {holder.worker}" if holder.worker else ""
                facts.append(
                    Fact(
                        name="held by",
                        value=f"{holder.run_id}{where}, {holder.state or 'gone'}, since {utc(holder.taken_at)} "
                        f"({scene.ago(holder.taken_at)})",
                    )
                )
            facts.append(Fact(name="before it in line", value=counted(ahead, "run")))
            if answer is None and len(holders) >= places:
                held = ", ".join(
                    f"{holder.run_id}{f' on {holder.worker}' if holder.worker else ''}" for holder in holders[:2]
                )
                more = f" and {len(holders) - 2} more" if len(holders) > 2 else ""
                answer = f"it waits for a slot of {what}, held by {held}{more}; {counted(ahead, 'run')} before it"
    if answer is None:
        answer = "a slot is free and about to be handed to whoever is first in line"
    return answer + ("" if scene.alive else f"; {_NOBODY} to hand it over"), facts


def retrying(scene: Scene, run: Run, _stands: Standing) -> Reason:
    """The next attempt has a time."""
    tried = f"attempt {run.attempts} failed"
    facts = [Fact(name="attempts", value=_attempts(run))]
    if run.error:
        facts.append(Fact(name="last error", value=run.error))
    if run.next_attempt_at is None:
        return f"{tried}; the next one has no time", facts
    facts.insert(0, Fact(name="next attempt", value=run.next_attempt_at))
    answer = f"{tried}, and the next is due at {utc(run.next_attempt_at)}, {scene.until(run.next_attempt_at)}"
    return answer + ("" if scene.alive else f"; {_NOBODY} to start it"), facts


def running(scene: Scene, run: Run, stands: Standing) -> Reason:
    """A worker holds it."""
    facts = [Fact(name="worker", value=run.worker or "unknown")]
    since = stands.attempt_started_at or run.started_at
    answer = f"it runs on {run.worker or 'a worker'}"
    if since is not None:
        facts.append(Fact(name="since", value=since))
        answer += f" since {utc(since)}, for {duration(max(0.0, (scene.now - since).total_seconds()))}"
    facts.append(Fact(name="attempts", value=_attempts(run)))
    if run.cancel_requested_at is not None:
        facts.append(Fact(name="cancel asked", value=run.cancel_requested_at))
        answer += f"; its worker was asked to cancel it {scene.ago(run.cancel_requested_at)}"
    if stands.heartbeat_at is not None:
        facts.append(Fact(name="last heartbeat", value=stands.heartbeat_at))
        if scene.now - stands.heartbeat_at > scene.at.settings.lease_time:
            who = "a keeper dispatches it again" if scene.alive else f"{_NOBODY} to dispatch it again"
            return (
                f"its worker {run.worker} gave its last heartbeat {scene.ago(stands.heartbeat_at)} and counts as lost: "
                f"{who}",
                facts,
            )
    return answer, facts


def _unless_worker(scene: Scene, run: Run) -> str:
    if not scene.workers:
        return ", but no worker is alive to run it"
    if not any(run.func_name in worker.functions for worker in scene.workers):
        return f", but no live worker knows {run.func_name!r}"
    return ""


def _sent(stands: Standing) -> list[Fact]:
    if not stands.publications:
        return [Fact(name="publications", value="none yet")]
    return [Fact(name="publications", value=str(stands.publications))]


def _attempts(run: Run) -> str:
    most = f" of at most {run.max_retries + 1}" if run.max_retries is not None else ""
    return f"{run.attempts} ended{most}"


#: What keeps a live run from going on, by its state.
LIVE_REASONS: Final[dict[RunState, Callable[[Scene, Run, Standing], Reason]]] = {
    RunState.PENDING: pending,
    RunState.QUEUED: queued,
    RunState.WAITING: waiting,
    RunState.RETRYING: retrying,
    RunState.RUNNING: running,
}
