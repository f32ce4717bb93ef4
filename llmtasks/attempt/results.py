"""Results: Celery's result backend as a tracer on a loop sees it. Nothing in here blocks the loop."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple, cast

from celery import states
from kombu.utils.encoding import bytes_to_str

from llmtasks.bridge import Gathering, Tracer, Wish, in_thread

#: Stores results and tells who waits for them, as Celery's backend does with a GET, then SETEX and PUBLISH: a success
#: that is there stays. KEYS: the tasks'. ARGV: for each the result, and the seconds to keep it or 0.
STORE: Final = """
for i = 1, #KEYS do
  local value, seconds = ARGV[2 * i - 1], tonumber(ARGV[2 * i])
  local there = redis.call('GET', KEYS[i])
  local readable, meta = pcall(cjson.decode, there or '{}')
  if not (readable and type(meta) == 'table' and meta.status == 'SUCCESS') then
    if seconds > 0 then
      redis.call('SETEX', KEYS[i], seconds, value)
    else
      redis.call('SET', KEYS[i], value)
    end
    redis.call('PUBLISH', KEYS[i], value)
  end
end
"""


class BackendOnLoop:
    """A task's result backend for its tracer: each call is made in a thread, while the loop goes on.

    Args:
        task: The task, whose backend outside of tracers is the real one.
        tracer: The tracer.
    """

    def __init__(self, task: Any, tracer: Tracer) -> None:
        self._task = task
        self._tracer = tracer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._task.backend_of_thread, name)
        return partial(self._in_thread, name) if callable(found) else found

    def _in_thread(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the backend that the thread has."""
        return in_thread(lambda: getattr(self._task.backend, method)(*args, **kwargs))

    def process_cleanup(self) -> None:
        """Do nothing: this thread's backend was not used."""

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, state: str = states.SUCCESS
    ) -> None:
        """Store a success, and tell the chord."""
        if request is not None and request.chord:
            self._in_thread("mark_as_done", task_id, result, request, store_result, state)
        elif store_result and not getattr(request, "ignore_result", False):
            self.store_result(task_id, result, state, request=request)

    def mark_as_failure(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = states.FAILURE,
    ) -> None:
        """Store a failure, and tell the chord, the rest of the chain and the errbacks."""
        if request is not None and (request.chord or request.chain or request.errbacks):
            self._in_thread("mark_as_failure", task_id, exc, traceback, request, store_result, call_errbacks, state)
        elif store_result:
            self.store_result(task_id, exc, state, traceback=traceback, request=request)

    def mark_as_retry(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        _store_result: bool = True,
        state: str = states.RETRY,
    ) -> Any:
        """Store that there will be another attempt."""
        return self.store_result(task_id, exc, state, traceback=traceback, request=request)

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **options: Any
    ) -> Any:
        """Store a state, on Redis together with others."""
        backend = self._task.backend_of_thread
        if options or request is None or not _is_redis(backend):
            return self._in_thread("store_result", task_id, result, state, traceback, request, **options)
        encoded = backend.encode_result(result, state)
        results = _Results.at(self._task.app)
        meta = meta_of(self._task.app, encoded, state, traceback, request, is_extended=results.is_extended)
        meta["task_id"] = bytes_to_str(task_id)
        seconds = backend.failure_expires if state == states.FAILURE else backend.expires
        packed = _Result(backend.get_key_for_task(task_id), backend.encode(meta), int(seconds or 0))
        self._tracer.wait_for(results.ask(packed))
        return encoded


def meta_of(app: Any, result: Any, state: str, traceback: Any, request: Any, *, is_extended: bool) -> dict[str, Any]:
    """What Celery stores with a result, as its own ``_get_result_meta`` makes it (backends/base.py:770).

    That one looks up settings and converts the time through dateutil each time: a tenth of what an empty run takes of
    the loop.
    """
    meta: dict[str, Any] = {
        "status": state,
        "result": result,
        "traceback": traceback,
        "children": [child.as_tuple() for child in request.children or ()],
        "date_done": datetime.now(app.timezone).isoformat() if state in states.READY_STATES else None,
    }
    if request.group:
        meta["group_id"] = request.group
    if request.parent_id:
        meta["parent_id"] = request.parent_id
    if is_extended:
        meta.update(
            name=request.task,
            args=request.args,
            kwargs=request.kwargs,
            worker=request.hostname,
            retries=request.retries,
            queue=(request.delivery_info or {}).get("routing_key"),
        )
        if request.stamps:
            names = request.stamped_headers or ()
            meta["stamped_headers"] = request.stamped_headers
            meta.update((name, stamp) for name, stamp in request.stamps.items() if name in names)
    return meta


class _Result(NamedTuple):
    key: str | bytes
    value: str
    #: To keep it; 0 is for ever.
    seconds: int


class _Results(Gathering[_Result]):
    """The thread that stores results for one app."""

    name = "llmtasks-results"

    def __init__(self, of: Any) -> None:
        self.is_extended = bool(of.conf.result_extended)
        super().__init__(of)

    def fulfil(self, group: list[Wish[_Result]]) -> None:
        """Store a group, as often as the backend's retry policy says."""
        backend = self.of.backend
        backend.ensure(self._store, (backend, group))

    @staticmethod
    def _store(backend: Any, group: list[Wish[_Result]]) -> None:
        keys = [wish.asked.key for wish in group]
        values = (part for wish in group for part in (wish.asked.value, wish.asked.seconds))
        backend.client.eval(STORE, len(keys), *keys, *values)


def _is_redis(backend: Any) -> bool:
    """Whether the script does what this backend does: JSON in a plain Redis or Valkey."""
    from celery.backends.redis import RedisBackend, SentinelBackend  # not every app has results there

    kind, celerys = type(backend), cast("Any", RedisBackend)  # its stub lacks what it is made of
    return (
        isinstance(backend, celerys)
        and not isinstance(backend, SentinelBackend)
        and backend.serializer == "json"
        and kind._store_result is celerys._store_result
        and kind._set is celerys._set
    )
