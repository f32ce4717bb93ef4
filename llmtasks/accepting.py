"""Accept: runs that are in the database before their message is sent: delayed ones and those of unique functions."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any, Final

from llmtasks import attempt, sender
from llmtasks.dispatch import accept, station
from llmtasks.identity import unique_of
from llmtasks.store.runs import NewRun

#: Options of a run that is part of a canvas: the others are sent already, or will never be.
_OF_CANVAS: Final = ("chain", "chord", "group_id")


def keep(
    task: Any, args: Any, kwargs: Any, task_id: str | None, delay: float, priority: int, **options: Any
) -> Any | None:
    """Keep a run in the database until its time; the broker could lose it or give it out twice.

    Returns:
        The handle of the run, or of the one that it is a duplicate of; None where the ledger knew a run with this id
        already, whose message is then the caller's to send: what replaces a run has its id, as has a link sent twice.

    Raises:
        DuplicateRunError: The function refuses a second run, and this one is no part of a canvas.
    """
    at = station(task.app)
    run_id = task_id or str(uuid.uuid4())
    parent = task.app.current_worker_task
    if parent is not None:
        options.setdefault("root_id", parent.request.root_id or parent.request.id)
        options.setdefault("parent_id", parent.request.id)
    for name in ("soft_time_limit", "time_limit"):
        options.setdefault(name, None)
    ignore_result = options.get("ignore_result")
    options["ignore_result"] = task.ignore_result if ignore_result is None else ignore_result
    expires = options.get("expires", task.expires)
    envelope = sender.envelope_of_options({**options, "expires": sender.absolute(expires)})
    new = NewRun(
        id=run_id,
        app=at.name,
        func_name=task.name,
        name=task.name,
        args=sender.dumps(list(args or ()), "args"),
        kwargs=sender.dumps(dict(kwargs or {}), "kwargs"),
        envelope=envelope,
        queue=options.get("queue") or task.options.queue,
        priority=priority,
        unique=unique_of(at.name, task.options, task.function, args or (), kwargs or {}),
    )
    # A tracer that tells an end sends links and the chain's next step: an error would fail the run that has succeeded.
    in_canvas = attempt.is_telling() or any(options.get(name) for name in _OF_CANVAS)
    # Whoever knows the id, and the links, are told that a duplicate does not run.
    traced = task_id is not None or in_canvas or bool(options.get("link") or options.get("link_error"))
    due = at.database.now() + timedelta(seconds=delay) if delay > 0 else None
    accepted = accept(at, new, due, traced=traced, refuses=not in_canvas)
    if not accepted.is_new and not accepted.is_duplicate:
        return None
    result = (options.get("result_cls") or task.AsyncResult)(accepted.run.id)
    if options.get("add_to_parent", True) and parent is not None:
        parent.add_trail(result)
    return result
