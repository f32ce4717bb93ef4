"""Errors: one tree, each also the stdlib error that a caller would expect, each a sentence that helps."""

import inspect
import pickle

import pytest

from llmtasks import errors
from llmtasks.errors import InvalidOptionError, LLMTasksError, UnknownTaskFunctionError, nearest

TREE = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, LLMTasksError)]


def test_tree_is_the_one_that_is_drawn() -> None:
    """The picture at the top of the module names every error under its parent, and nothing else."""
    drawn: list[tuple[str, str]] = []
    parents = ["LLMTasksError"]
    for line in (errors.__doc__ or "").splitlines():
        text = line[4:]
        name = text.lstrip("│├└─ ").split(" ")[0]
        if not name.endswith("Error") or not line.startswith("    "):
            continue
        depth = (len(text) - len(text.lstrip("│├└─ "))) // 4
        parents[depth:] = [name]
        if depth:
            drawn.append((name, parents[depth - 1]))

    real = [(cls.__name__, cls.__mro__[1].__name__) for cls in TREE if cls is not LLMTasksError]
    assert sorted(drawn) == sorted(real)


@pytest.mark.parametrize(
    ("error", "stdlib"),
    [
        (errors.InvalidOptionError, ValueError),
        (errors.InvalidTriggerError, ValueError),
        (errors.NotFoundError, LookupError),
        (errors.RunNotFoundError, LookupError),
        (errors.InvalidParamsError, TypeError),
    ],
)
def test_error_is_the_stdlib_one_too(error: type[Exception], stdlib: type[Exception]) -> None:
    """Code that does not know llmtasks catches it under the name that it would look for."""
    assert issubclass(error, stdlib)


def test_option_error_names_option_value_and_expectation() -> None:
    """And the hint, if there is one."""
    plain = InvalidOptionError("priority", 11, "a whole number from 1 to 10")
    hinted = InvalidOptionError("priority", 11, "a whole number from 1 to 10", "1 runs first, 10 last.")

    assert str(plain) == "priority=11: expected a whole number from 1 to 10"
    assert str(hinted) == "priority=11: expected a whole number from 1 to 10. 1 runs first, 10 last."
    assert (plain.option, plain.value) == ("priority", 11)


@pytest.mark.parametrize(
    ("known", "advice"),
    [
        (["sync_emails", "sync_mails", "report"], "did you mean 'sync_emails' or 'sync_mails'?"),
        (["report", "index"], "registered are 'index', 'report'"),
        ([f"zz{n:02}" for n in range(12)], "'zz09'..."),
        ([], "none is registered: import the module that registers it first"),
    ],
)
def test_unknown_function_comes_with_advice(known: list[str], advice: str) -> None:
    """The nearest names, else all that there are, else what is missing."""
    error = UnknownTaskFunctionError("sync_email", known)

    assert str(error).startswith("no task function is registered as 'sync_email'; ")
    assert str(error).endswith(advice)
    assert error.name == "sync_email"


def test_lookup_errors_are_sentences() -> None:
    """KeyError quotes its message; ours do not, and an empty one is empty."""
    assert str(errors.TaskNotFoundError("no Task has the id 'x'")) == "no Task has the id 'x'"
    assert str(errors.RunNotFoundError()) == ""


def test_nearest_names_come_best_first() -> None:
    """At most three, and none that is far off."""
    assert nearest("max_retry", ["queue", "max_tries", "max_retries"]) == ["max_retries", "max_tries"]
    assert nearest("xyz", ["abc"]) == []
    assert len(nearest("task", [f"task{n}" for n in range(9)])) == 3


@pytest.mark.parametrize("error", [errors.ConfigurationError("x"), errors.TaskNotFoundError("y")], ids=repr)
def test_errors_survive_pickling(error: LLMTasksError) -> None:
    """They cross process borders in pools."""
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
