"""Options: what types they may have, and how a text becomes a value of one."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from stillknows.errors import UserError, did_you_mean

READABLE = "use int, float, bool, str or Literal words, one of these | None, or Annotated with Limits or Names"


class Limits(NamedTuple):
    """The numbers that an option may be, as in `alpha: Annotated[float, Limits(0, 1)]`; `above` leaves out
    `least`, `below` leaves out `most`."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False

    def read(self, name: str, value: float | None) -> float | None:
        """Return the number. Raises UserError for one outside; None, which some options may be, is not one."""
        at_ends = {self.least: not self.above, self.most: not self.below}
        if value is None or self.least < value < self.most or at_ends.get(value, False):
            return value
        least = f"{'more than' if self.above else 'at least'} {self.least:g}"
        most = f", {'below' if self.below else 'at most'} {self.most:g}" if self.most < math.inf else ""
        raise UserError(f"{name}={value:g} is out of range", f"give {least}{most}")


def is_readable(kind: Any) -> bool:
    """Tell whether `convert` knows an annotated type."""
    if get_origin(kind) is Annotated:
        inner, *readers = get_args(kind)
        return is_readable(inner) and len(readers) == 1 and hasattr(readers[0], "read")
    if get_origin(kind) is Literal:
        return all(isinstance(word, str) for word in get_args(kind))
    if type(None) in get_args(kind):
        return len(get_args(kind)) == 2 and any(map(is_readable, get_args(kind)))
    return kind in (int, float, bool, str)


def type_name(kind: Any) -> str:
    """Return the name of a type that `is_readable` knows: "int", "float | none"; of words, "word"."""
    if get_origin(kind) is Annotated:
        return type_name(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "word"
    if type(None) in get_args(kind):
        return f"{type_name(next(t for t in get_args(kind) if t is not type(None)))} | none"
    return kind.__name__


def convert(name: str, text: str, kind: Any) -> Any:
    """Read a value of the annotated type: int, float, bool, str, a Literal, one of these | None, with Limits or Names.

    Raises UserError.
    """
    if get_origin(kind) is Annotated:
        kind, reader = get_args(kind)
        return reader.read(name, convert(name, text, kind))
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise UserError(f"{name}={text} is not known{did_you_mean(text, get_args(kind))}")
        return text
    if type(None) in get_args(kind):
        if text.lower() == "none":
            return None
        kind = next(t for t in get_args(kind) if t is not type(None))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{name}={text} is not true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{name}={text} is not of type {kind.__name__}") from None
