"""Bulk: one function's runs for many items, many in one round trip; ``map_delay`` says what that promises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NoReturn

from llmtasks import sender
from llmtasks.errors import InvalidOptionError, InvalidParamsError, LLMTasksError, UnavailableError

#: Messages that one round trip carries.
SIZE: Final = 500
#: What ``apply_async`` takes for one run alone.
_OF_ONE: Final = ("args", "kwargs", "producer", "task_id")

#: Positional and keyword arguments.
_Arguments = tuple[Sequence[Any], Mapping[str, Any]]


def send_each(task: Any, items: Iterable[Any], options: dict[str, Any]) -> list[Any]:
    """Send a run for each item; see ``RunTask.map_delay``."""
    for name in _OF_ONE:
        if name in options:
            raise InvalidOptionError(name, options[name], "only options that all runs share")
    send = _way(task, options)
    sent: list[Any] = []
    waiting = iter(items)
    while piece := [_arguments_of(item) for item in islice(waiting, SIZE)]:
        send(task, piece, options, sent)
    return sent


def _way(task: Any, options: dict[str, Any]) -> Any:
    if task.app.conf.task_always_eager or task.is_kept(options):
        return _one_by_one
    shared = sender.is_shared(task, task.publish_options(options), many=True)
    return _together if shared else _in_kombus_batch


def _together(task: Any, piece: list[_Arguments], options: dict[str, Any], sent: list[Any]) -> None:
    """Messages of which Celery makes the first, and that tells how to make the others."""
    args, kwargs = piece[0]
    results: list[Any] = []
    batch = sender.Batch(task, task.publish_options(options), args, kwargs)
    check, add = task.check_header, batch.add
    try:
        for args, kwargs in piece:
            check(args, kwargs)
            results.append(add(args, kwargs))
    except Exception as error:
        _refuse(task, error, (args, kwargs), sent, len(sent) + len(results))
    try:
        batch.send()
    except Exception as error:
        sent += results[: len(results) - batch.unsent]
        _interrupt(task, error, sent, batch.unsent)
    sent += results


def _in_kombus_batch(task: Any, piece: list[_Arguments], options: dict[str, Any], sent: list[Any]) -> None:
    """Messages that Celery makes one by one: the app watches or routes each."""
    results: list[Any] = []
    bad: _Arguments | None = None
    try:
        with task.app.producer_or_acquire() as producer, producer.batch(max_size=len(piece) * 3):
            for args, kwargs in piece:
                bad = args, kwargs
                results.append(task.apply_async(args, kwargs, producer=producer, **options))
            bad = None
    except Exception as error:
        if bad is not None and not isinstance(error, UnavailableError):
            _refuse(task, error, bad, sent, len(sent) + len(results))
        _interrupt(task, error, sent, len(piece))
    sent += results


def _one_by_one(task: Any, piece: list[_Arguments], options: dict[str, Any], sent: list[Any]) -> None:
    """Runs that are in the database before they are sent, or that run here and now."""
    for args, kwargs in piece:
        try:
            sent.append(task.apply_async(args, kwargs, **options))
        except Exception as error:
            _refuse(task, error, (args, kwargs), sent, len(sent))


def _refuse(task: Any, error: Exception, arguments: _Arguments, sent: list[Any], index: int) -> NoReturn:
    """Raise what an item is refused for, and say which item that is."""
    explained = task.explained(error, *arguments)
    if isinstance(explained, InvalidParamsError):
        explained = InvalidParamsError(f"item {index}: {explained}")
    else:
        explained.add_note(f"This is about item {index}.")
    _raise(explained, error, sent)


def _interrupt(task: Any, error: Exception, sent: list[Any], perhaps: int) -> NoReturn:
    """Raise what a broker is away for, and say what it has."""
    explained = task.explained(error, (), {})
    if isinstance(explained, UnavailableError):
        items = f"the first {len(sent)} items were sent, the next {perhaps} perhaps, the others not"
        explained = type(explained)(f"{explained}; {items}")
    _raise(explained, error, sent)


def _raise(explained: Exception, error: Exception, sent: list[Any]) -> NoReturn:
    if isinstance(explained, LLMTasksError):
        explained.sent = sent
    if explained is error:
        raise error
    raise explained from error


def _arguments_of(item: Any) -> _Arguments:
    if isinstance(item, tuple):
        return item, {}
    if isinstance(item, dict):
        return (), item
    return (item,), {}
