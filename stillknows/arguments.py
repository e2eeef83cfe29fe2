"""Arguments of Python functions, checked against the types that are written beside them."""

from __future__ import annotations

import functools
import inspect
import numbers
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from stillknows.errors import UserError, did_you_mean

LONG_VALUE = 80  # characters; longer ones are named by their type
P = ParamSpec("P")
R = TypeVar("R")


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, which raises UserError for options that it does not have, with the nearest that it has, and
    for arguments of other types than its annotations say."""
    signature = inspect.signature(function)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        for name in () if takes_all else options.keys() - signature.parameters:
            raise UserError(f"there is no option {name!r}{did_you_mean(name, signature.parameters)}")
        kinds = get_type_hints(function)
        for name, value in signature.bind(*args, **options).arguments.items():
            is_many = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                for one in value if is_many else (value,):
                    require_type(name, one, kinds[name])
        return function(*args, **options)

    return call


def require_type(name: str, value: object, kind: Any) -> None:
    """Raise UserError for a value that is not of an annotated type; it calls it `name`."""
    if not fits(value, kind):
        raise UserError(f"{name}{_shown(value)} is of the wrong type", f"give {_words(kind)}")


def _shown(value: object) -> str:
    """Return a value after its name, or what it is where it is long."""
    text = repr(value)
    return f"={text}" if len(text) <= LONG_VALUE and "\n" not in text else f", a {type(value).__name__},"


def fits(value: object, kind: Any) -> bool:
    """Tell whether a value is of an annotated type. Whole numbers are taken for float; bool for nothing but itself."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        parts = inner[:1] * len(value) if isinstance(value, tuple) and inner[1:] == (...,) else inner
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if origin is Sequence:
        return (
            isinstance(value, Sequence) and not isinstance(value, str) and all(fits(part, inner[0]) for part in value)
        )
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(part, inner[1]) for part in value.values())
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _words(kind: Any) -> str:
    """Return a type as it is written."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_words, get_args(kind)))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if kind is type(None):
        return "None"
    return re.sub(r"(typing|collections\.abc)\.", "", str(kind)) if get_args(kind) else kind.__name__
