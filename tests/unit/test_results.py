"""What is stored with a result on a loop is what Celery's own backend stores."""

from datetime import datetime
from typing import Any

import pytest
from celery import Celery, states
from celery.app.task import Context
from celery.result import AsyncResult

from llmtasks.attempt.results import meta_of

REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "of a group": {"group": "g", "parent_id": "p"},
    "with children": {"children": [AsyncResult("child", parent=AsyncResult("parent"))]},
    "without a queue": {"delivery_info": None},
    "stamped": {"stamps": {"team": ["rag"], "unasked": ["x"]}, "stamped_headers": ["team"]},
    "stamped, without headers": {"stamps": {"team": ["rag"]}, "stamped_headers": None},
}


@pytest.mark.parametrize("timezone", ["UTC", "Asia/Shanghai"])
@pytest.mark.parametrize("is_extended", [False, True])
@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE, states.RETRY, states.STARTED])
def test_meta_is_celerys(state: str, kind: str, is_extended: bool, timezone: str) -> None:
    """Field by field, for each state, kind of request and setting; the time is the same but for the moment between."""
    app = Celery("results", backend="cache+memory://", set_as_current=False)
    app.conf.update(result_extended=is_extended, timezone=timezone)
    about = {"id": "a", "task": "embed", "args": [1], "kwargs": {"k": 2}, "hostname": "w@h", "retries": 3}
    where = {"delivery_info": {"routing_key": "celery"}}
    request = Context({**about, **where, **REQUESTS[kind]})
    backend: Any = app.backend

    celerys = backend._get_result_meta({"a": 1}, state, "trace", request)
    ours = meta_of(app, {"a": 1}, state, "trace", request, is_extended=is_extended)

    times = [found.pop("date_done") for found in (celerys, ours)]
    assert ours == celerys
    if state in states.READY_STATES:
        before, after = map(datetime.fromisoformat, times)
        assert 0 <= (after - before).total_seconds() < 5
        assert after.utcoffset() == before.utcoffset()
    else:
        assert times == [None, None]
