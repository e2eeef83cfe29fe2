"""Values of published logs, read by type: every message names the file, the item and the key.

Logs hold keys that are none of ours (texts, names, settings). They are left aside; what is needed is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stillknows.errors import UserError


def read_rows(where: str, items: Any) -> list[dict[str, Any]]:
    """Return a non-empty list of tables."""
    if not isinstance(items, list):
        raise UserError(f"{where}: expected a list of items, got {kind(items)}")
    if not items:
        raise UserError(f"{where}: the list is empty")
    for i, row in enumerate(items):
        if not isinstance(row, dict) or not row:
            raise UserError(f"{where}: item {i} is {'empty' if row == {} else kind(row)}, not a table of values")
    return items


def read_values(where: str, rows: Sequence[Mapping[str, Any]], key: str, read: Callable[[str, Any], Any]) -> list:
    """Return what each row holds under a key; UserError where one has nothing."""
    for i, row in enumerate(rows):
        if key not in row:
            raise UserError(f"{where}: item {i} has no {key!r}")
    return [read(f"{where}: item {i}, {key!r}", row[key]) for i, row in enumerate(rows)]


def read_columns(where: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return what the rows hold under every key that has a number in some row; all others are data of the log's own.

    Raises UserError for a row without one of these numbers, and where there are none at all.
    """
    names = dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value))
    if not names:
        raise UserError(f"{where}: the items hold no numbers")
    return {name: read_values(where, rows, name, read_number) for name in names}


def read_summary(where: str, table: Any) -> dict[str, float]:
    """Return the numbers of a table of recorded results; other things, such as the model's name, are left out."""
    if not isinstance(table, dict):
        raise UserError(f"{where} is {kind(table)}, not a table")
    return {key: read_recorded(f"{where}, {key!r}", x) for key, x in table.items() if is_number(x)}


def read_recorded(where: str, value: Any) -> float:
    """Read a number that is only compared with ours: it may be infinite or none."""
    if not is_number(value):
        raise UserError(f"{where} is {kind(value)}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{where} is a number that is too large") from None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_number(where: str, value: Any) -> float:
    value = read_recorded(where, value)
    if not math.isfinite(value):
        raise UserError(f"{where} is {value}: nothing can be computed from it")
    return value


def read_count(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where} is {value!r}, not a number of tokens")
    return value


def read_text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {kind(value)}, not a text")
    return value


def each(read: Callable[[str, Any], Any]) -> Callable[[str, Any], list]:
    """Return a reader of lists whose values `read` reads."""

    def read_list(where: str, values: Any) -> list:
        if not isinstance(values, list):
            raise UserError(f"{where} is {kind(values)}, not a list")
        return [read(where, value) for value in values]

    return read_list


def kind(value: Any) -> str:
    names = {dict: "a table", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
