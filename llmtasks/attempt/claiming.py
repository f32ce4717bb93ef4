"""Claim: take the run and its slots in one transaction, or leave it to whoever has it."""

from __future__ import annotations

import logging
import uuid
from datetime import UTC, datetime
from typing import Any

from celery.exceptions import Ignore

from llmtasks import bridge, sender
from llmtasks.attempt.writer import Writer
from llmtasks.bridge import Body
from llmtasks.dispatch import station
from llmtasks.holding import Hold, holdings, persist
from llmtasks.known_pauses import known_pauses
from llmtasks.options import TaskOptions
from llmtasks.owner import owner_of
from llmtasks.policies import JITTERED, may_wait
from llmtasks.states import ENDED, PauseKind, RunState
from llmtasks.store import claims, pauses, schedules, slots
from llmtasks.store.claims import Claim, Offer

logger = logging.getLogger(__name__)


def claim_run(task: Any, options: TaskOptions) -> Hold:
    """Take the run and its slots in one transaction, which is one statement for a run without a limit.

    Raises:
        Ignore: It is not ours to run now; the message is done with.
    """
    request, at = task.request, station(task.app)
    where = request.delivery_info or {}
    offer = Offer(
        id=request.id,
        app=at.name,
        func_name=task.name,
        args=sender.dumps(request.args, "args"),
        kwargs=sender.dumps(request.kwargs, "kwargs"),
        envelope=sender.envelope_of_request(request, sender.ignores_result(task, request)),
        queue=where.get("routing_key"),
        priority=sender.user_priority(task.app, where.get("priority")),
        attempts=request.retries or 0,
        max_retries=task.max_retries,
        retry_delay=task.default_retry_delay,
        function_slots=options.max_instances,
        owner=owner_of(),
        worker=request.hostname or "",
        created_at=_sent_at(request),
    )

    def take() -> tuple[Claim | None, str | None]:
        now = at.database.now()
        silent_since = now - at.settings.lease_time
        if tracer is None and not may_be_paused:
            with at.database.lone() as lone:
                found = claims.claim_slotless(lone, offer, now, silent_since)
            if found is not None:
                return found, None
        with at.database.transaction() as tx:
            found = claims.claim(tx, offer, now, silent_since)
            if found is None or found.state in ENDED:
                return found, None
            pause = pauses.get(tx, at.name, PauseKind.FUNCTION, task.name) if may_be_paused else None
            if pause is not None:
                slots.free(tx, found.id, now)
                claims.put_aside(tx, found, RunState.WAITING, str(pause), now)
                return found, str(pause)
            full = claims.take_slots(tx, at.name, task.name, found, now)
            if full is not None:
                state = RunState.SKIPPED if _may_skip(tx, found) else RunState.WAITING
                claims.put_aside(tx, found, state, full, now)
            return found, full

    tracer, may_be_paused = bridge.tracer_here(), known_pauses.may_hold_up(at, task.name)
    claim, full = None, None
    if tracer is not None and offer.function_slots is None and not may_be_paused:
        claim = tracer.wait_for(Writer.at(at).claim(offer))
    if claim is None:
        claim, full = persist(take)
    if claim is None:
        raise Ignore("the run has ended, is held elsewhere, or was superseded")
    if full is not None:
        logger.info("run %s does not start: %s", claim.id, full)
        raise Ignore(full)
    soft, hard = limits_of(task, request)
    body = Body(soft_limit=soft, hard_limit=hard, name=f"run {claim.id} of {task.name}")
    hold = Hold(station=at, claim=claim, body=body, args=offer.args, kwargs=offer.kwargs)
    holdings.hold(hold)
    return hold


def name_links(request: Any) -> None:
    """Give links and errbacks fixed ids, so that the claim drops the copies that a replay sends."""
    for kind in ("callbacks", "errbacks"):
        for index, link in enumerate(getattr(request, kind, None) or ()):
            if not link.get("subtask_type"):
                link["options"].setdefault("task_id", str(uuid.uuid5(_as_uuid(request.id), f"{kind}{index}")))


def limits_of(task: Any, request: Any) -> tuple[float | None, float | None]:
    """Seconds after which the function is told that its time is up, and is ended: of the message, else of the task."""
    hard, soft = request.timelimit or (None, None)
    return soft or task.soft_time_limit or None, hard or task.time_limit or None


def _may_skip(tx: Any, claim: Claim) -> bool:
    """Only the first claim of a periodic instant: the next comes anyway.

    One that stands for missed ones waits, one that somebody asked for, and one whose overlap policy lets it.
    """
    if claim.schedule_id is None or claim.scheduled_for is None or claim.attempts:
        return False
    if claim.reason and not claim.reason.startswith(JITTERED):
        return False
    if claim.claim_no > 1:  # it ran before and was put back uncounted, by a worker that shut down
        return False
    schedule = schedules.get(tx, claim.schedule_id)
    return schedule is not None and schedule.is_periodic and not may_wait(schedule.options)


def _sent_at(request: Any) -> datetime | None:
    """When the run was sent by its sender's clock."""
    sent = (request.headers or {}).get(sender.SENT_HEADER)
    return datetime.fromtimestamp(sent, UTC) if isinstance(sent, int | float) else None


def _as_uuid(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        return uuid.uuid5(uuid.NAMESPACE_OID, text)
