"""A function named in the configuration, with its options checked against its signature. Imports no torch."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fastpo.config import Plugin


def resolve(table: Mapping[str, Callable], plugin: Plugin, *, key: str = "") -> Callable:
    """The function `plugin.name` of `table`, or of "package.module:function", with the plugin's options bound.

    Options are the function's keyword-only parameters; values become what the annotation says ("5e-7" a float).
    key: where the plugin stands in the configuration ("loss"), for the messages.
    Raises ValueError naming the key, the function and its options for an unknown function or option, a value
    of the wrong type, or a missing option.
    """
    function = table[plugin.name] if plugin.name in table else _imported(plugin.name, table, key)
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    allowed = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    options, problems = {}, []
    for name, value in plugin.options.items():
        if name not in allowed:
            problems.append(f"{_join(key, name)}: unknown option")
            continue
        annotation = allowed[name].annotation
        try:
            options[name] = TypeAdapter(Any if annotation is inspect.Parameter.empty else annotation).validate_python(
                value
            )
        except ValidationError as error:
            problems.append(f"{_join(key, name)}: {error.errors()[0]['msg']} (got {value!r})")
    missing = [p.name for p in allowed.values() if p.default is p.empty and p.name not in plugin.options]
    problems += [f"{_join(key, name)}: missing option" for name in missing]
    if problems:
        takes = ", ".join(sorted(allowed)) or "no options"
        raise ValueError("; ".join(problems) + f" ({plugin.name} takes {takes})")
    return partial(function, **options)


def _imported(name: str, table: Mapping[str, Callable], key: str) -> Callable:
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(sorted(table))
        raise ValueError(f"{_join(key, 'name')}: unknown {name!r}, expected one of {known} or package.module:function")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{_join(key, 'name')}: cannot import {name!r}: {error}") from error


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
