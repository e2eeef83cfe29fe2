"""A diagnosis as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stillknows.analysis import explain
from stillknows.formatting import markdown_table, number, percent, significant

WHAT_IS_LEFT = ["changed", "crossing", "surviving"]
WHY = ["update in steps", "changed in zero bin", "all in zero bin"]


def text(result: Mapping[str, Any], *, layers: bool = False, sizes: bool = False) -> str:
    """Return what each format leaves and why, in Markdown: two tables, which fit 80 columns, and each format's cause.

    Args:
        result: what `diagnose` returns.
        layers: add a table by layer for each format.
        sizes: add a table of the formats by the size of weights.
    """
    formats = result["formats"]
    left = [[found["format"], *_what_is_left(found), _recovery(found["recovery"])] for found in formats]
    why = [[found["format"], *_why(found)] for found in formats]
    parts = [markdown_table(["format", *WHAT_IS_LEFT, "recovery to expect"], left), *_outside(formats)]
    parts += [markdown_table(["format", *WHY], why)]
    parts += ["\n".join(line for found in formats for line in _sentences(found))]
    parts += [explain.storage(result["run"])] if result["run"] else []
    parts += [_size_table(formats)] if sizes else []
    for found in formats if layers else ():
        rows = [[layer["layer"], *_what_is_left(layer), *_why(layer)] for layer in found["layers"]]
        parts += [markdown_table([found["format"], *WHAT_IS_LEFT, *WHY], rows)]
    return "\n\n".join(parts)


def _recovery(prediction: Mapping[str, Any] | None) -> str:
    if prediction is None:
        return "–"
    bounds = f"{number(prediction['low'])} to {number(prediction['high'])}"
    return f"{number(prediction['recovery'])} ({bounds}){'*' if prediction['outside'] else ''}"


def _outside(formats: list[Mapping[str, Any]]) -> list[str]:
    """Say once in what respect predictions go beyond what was measured."""
    reasons = dict.fromkeys(f["recovery"]["outside"] for f in formats if f["recovery"] and f["recovery"]["outside"])
    words = "* beyond the small models that the prediction was fitted to, where its bounds may not hold: "
    return [words + "; ".join(reasons) + "."] if reasons else []


def _sentences(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['format']}: " + ". ".join(filter(None, (found["cause"], explain.remedy(found)))) + "."


def _what_is_left(shares: Mapping[str, Any]) -> list[str]:
    return [percent(shares["changed"]), percent(shares["crossing"]), number(shares["surviving"], "–")]


def _why(shares: Mapping[str, Any]) -> list[str]:
    steps = significant(shares["update_steps"], "–")
    return [steps, _percent(shares["zero_bin_changed"]), percent(shares["zero_bin"])]


def _size_table(formats: list[Mapping[str, Any]]) -> str:
    """Return the share of weights changed by their size in steps, with the share that has this size in brackets."""
    header = ["size in steps", *(_range(size) for size in formats[0]["sizes"])]
    rows = [
        [
            found["format"],
            *(f"{_percent(size['changed'])} ({percent(size['weights'])})" for size in found["sizes"]),
        ]
        for found in formats
    ]
    return "Changed weights by size, and in brackets how many have it:\n\n" + markdown_table(header, rows)


def _range(size: Mapping[str, Any]) -> str:
    if size["to"] is None:
        return f"from {size['from']:g}"
    return f"{size['from']:g}–{size['to']:g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else percent(share)
