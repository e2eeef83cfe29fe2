"""JSON as text: the one parser of what others wrote, and what can be written as JSON at all."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stillknows.errors import UserError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_DEPTH = 100  # levels of nesting; parsers of other libraries give up at 128, and Python's own at about 1,000
MAX_DIGITS = 308  # of an integer: one with more is beyond every float
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, place: str, *, unique: bool = False) -> Any:
    """Return what JSON text holds; the one parser of files that others wrote.

    Args:
        unique: refuse a key that an object gives twice, of which JSON keeps the last.

    Raises UserError that names the place: text that is no JSON, is nested more than MAX_DEPTH levels deep, or holds an
    integer of more than MAX_DIGITS digits or half a character (a lone surrogate, which no encoding can write).
    """
    try:
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_once(place) if unique else None)
    except RecursionError:
        raise _too_deep(place) from None
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [part for parts in map(_parts, level) for part in parts]
    if level:
        raise _too_deep(place)
    if ESCAPED_SURROGATE.search(text):
        _require_whole_characters(value, place)
    return value


def _once(place: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Return what makes an object of its keys and values, each key once."""

    def gathered(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{place} gives {twice!r} twice in one object", "keep one of them")
        return found

    return gathered


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits, at most {MAX_DIGITS} are read")
    return int(digits)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep(place: str) -> UserError:
    return UserError(f"{place} is nested more than {MAX_DEPTH} levels deep, which no file of this kind is")


def _require_whole_characters(value: Any, place: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} holds half a character: {error.reason}", "correct the text") from error


def json_able(value: Any) -> Any:
    """Return a value with what JSON has no form for replaced: the one place for NaN and infinity.

    Lists stand for tuples, null for numbers that are not finite, "\ufffd" for half a character.
    """
    if isinstance(value, Mapping):
        return {json_able(name): json_able(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_able(part) for part in value]
    if isinstance(value, str):
        return LONE_SURROGATE.sub("\ufffd", value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_text(value: Any) -> str:
    """Return JSON; a byte of a file's name that is not UTF-8 becomes "\ufffd"."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return LONE_SURROGATE.sub("\ufffd", text)
