"""What results of `stillknows score` share: numbers with bounds as JSON, and how those of a log compare with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from stillknows.errors import NotMeasured
from stillknows.json_text import json_able
from stillknows.registry import bind
from stillknows.specs import parse
from stillknows.types import Floats, Interval, Observations

Json = dict[str, Any]
EXACT, SINGLE = 1e-9, 1e-5  # what two computations may differ by: in float64, and relatively where one was in float32


class Agreement(NamedTuple):
    """How the numbers that a log records compare with those computed here."""

    name: str
    compared: int
    disagreeing: int
    largest_difference: float


def compare(name: str, ours: Floats, theirs: Floats, tolerance: float) -> Agreement:
    """Compare two arrays [N]; NaN agrees with NaN."""
    agrees = np.isclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    with np.errstate(invalid="ignore"):  # ∞ − ∞
        gaps = np.where(agrees & ~np.isfinite(ours), 0.0, np.abs(ours - theirs))
    return Agreement(name, len(gaps), int(np.count_nonzero(~agrees)), float(gaps.max()))


def compare_one(name: str, ours: float, theirs: float, tolerance: float) -> Agreement:
    return compare(name, np.array([ours]), np.array([theirs]), tolerance)


def summed(name: str, parts: list[Agreement]) -> Agreement:
    """Return many comparisons as one."""
    worst = max(part.largest_difference for part in parts)
    return Agreement(name, sum(part.compared for part in parts), sum(part.disagreeing for part in parts), worst)


def told(compared: list[Agreement]) -> Json:
    """Return {"recorded": every comparison, "warnings": a sentence for each that disagrees}."""
    warnings = [
        f"{c.name}: {c.disagreeing} of {c.compared} recorded values are not what is computed here; "
        f"the largest difference is {c.largest_difference:.3g}"
        for c in compared
        if c.disagreeing
    ]
    return {"recorded": [json_able(c._asdict()) for c in compared], "warnings": warnings}


def measured(spec: str, subject: Mapping[str, Observations], control: Mapping[str, Observations] | None) -> Json:
    """Return a figure's numbers by name, or under its own name the reason why it was not measured."""
    try:
        numbers = bind("metric", spec)(subject=subject, control=control)
    except NotMeasured as reason:
        return {parse(spec).name: not_measured(reason)}
    return {name: as_json(number) for name, number in numbers.items()}


def not_measured(reason: object) -> Json:
    return {"not_measured": str(reason)}


def as_json(number: Interval) -> Json:
    return json_able(number._asdict())
