"""Identity: which calls of a function are the same, however they are written."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmtasks import sender
from llmtasks.errors import InvalidOptionError, InvalidParamsError
from llmtasks.options import TaskOptions
from llmtasks.uniqueness import Unique


def unique_of(
    app: str, options: TaskOptions, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Unique | None:
    """What a run with these arguments must be the only one in; None where its function is not unique.

    Arguments are bound to the function's signature first, defaults included: ``f(1)``, ``f(a=1)`` and ``f(1, b=2)`` are
    one call where 2 is the default of ``b``.

    Raises:
        InvalidParamsError: The arguments do not fit the signature, or JSON cannot carry them.
    """
    rule = options.unique_rule
    if rule is None:
        return None
    signature = signature_of(options, function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as misfit:
        raise InvalidParamsError(
            f"arguments of {options.name!r} do not fit its signature {signature}: {misfit}"
        ) from None
    bound.apply_defaults()
    values = dict(bound.arguments)
    if rule.parameters is not None:
        values = {name: _value(signature, values, name) for name in rule.parameters}
    # Read back as plain JSON: only its own types are left, in one order.
    plain = {name: json.loads(sender.dumps(value, name)) for name, value in values.items()}
    text = json.dumps([app, options.name, plain], sort_keys=True)
    return Unique(key=hashlib.sha256(text.encode()).hexdigest(), rule=rule)


def signature_of(options: TaskOptions, function: Callable[..., Any]) -> inspect.Signature:
    """The function's signature as its callers see it: without the ``self`` that Celery gives to a bound one."""
    signature = inspect.signature(function)
    if not options.celery.get("bind"):
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def check_identity(options: TaskOptions, function: Callable[..., Any]) -> None:
    """Check that the parameters that ``unique`` compares exist, and that their defaults can be compared.

    Raises:
        InvalidOptionError: One does not, or cannot.
    """
    rule = options.unique_rule
    if rule is None:
        return
    parameters = signature_of(options, function).parameters
    takes_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    for name in rule.parameters or ():
        if name not in parameters and not takes_any:
            raise InvalidOptionError(
                "unique", name, f"a parameter of {options.name}: {', '.join(parameters) or 'it has none'}"
            )
    for name in parameters if rule.parameters is None else rule.parameters:
        given = parameters.get(name)
        if given is None or given.default is inspect.Parameter.empty:
            continue
        try:
            sender.dumps(given.default, f"the default of {name}")
        except InvalidParamsError as error:
            raise InvalidOptionError(
                "unique", options.unique, "parameters whose defaults JSON can carry", f"{error}."
            ) from None


def _value(signature: inspect.Signature, values: Mapping[str, Any], name: str) -> Any:
    """The value of a parameter, or of a keyword that only ``**kwargs`` takes."""
    if name in values:
        return values[name]
    for item in signature.parameters.values():
        if item.kind is inspect.Parameter.VAR_KEYWORD:
            return values[item.name].get(name)
    return None
