"""The tables and the scale that the page and the Markdown of a report share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from stillknows.auditing.evidence import RETAINED_ROLES
from stillknows.formatting import number, significant
from stillknows.reporting.overview import NOT_ASKED
from stillknows.reporting.schema import AuditReport, Measured, ReportSubject
from stillknows.types import FULL, SUITE, WEIGHTS

NO_FORMAT = "weights are compared in formats alone"
UNCHANGED = "nothing that the format rounds was changed here"


class Missing(NamedTuple):
    """A table's cell without a number; `note` is the place of its reason in the table's list, from 1."""

    variant: str
    not_measured: str
    note: int


class Grid(NamedTuple):
    """One metric on one split, models × variants. Unmeasured cells carry the number of their reason in `notes`.

    `own_unit`: published figures and general tasks have units and directions of their own; all else is a share.
    `floor`: below it a value is marked; None for what has none.
    """

    metric: str
    split: str
    rows: list[tuple[str, list[Measured | Missing]]]
    notes: list[str]
    own_unit: bool = False
    floor: float | None = None

    def is_low(self, cell: Measured) -> bool:
        """Tell whether a measured value lies below the floor."""
        return self.floor is not None and cell.value < self.floor


def value_words(cell: Measured, own_unit: bool = False) -> str:
    """Return the value of a measured cell: shares with two decimals, numbers of an own unit in their own size."""
    return _written(own_unit)(cell.value)


def bounds_words(low: float | None, high: float | None, own_unit: bool = False) -> str:
    """Return bounds in words; None has no finite value."""
    written = _written(own_unit)
    return f"{written(low, '−∞')} to {written(high, '∞')}"


def span(cell: Measured, own_unit: bool = False) -> str:
    """Return the bounds of a measured cell in words."""
    return bounds_words(cell.low, cell.high, own_unit)


def _written(own_unit: bool) -> Callable[..., str]:
    return significant if own_unit else number


def grids(report: AuditReport) -> dict[str, list[Grid]]:
    """Return the tables of a report: knowledge kept per gate (the lead first), utility, recovery, numbers of others'
    making, the update's fate. What is measured neither on a split nor on weights is a general task.
    """
    policy, lead = report.policy, report.lead
    forget = report.splits_of("forget")
    floors = {split.name: policy.utility_floor if split.role == "retain" else None for split in report.splits}
    splits = {WEIGHTS, *(split.name for split in report.splits)}
    places = dict.fromkeys((cell.split, cell.metric) for s in report.subjects for cell in s.cells)
    others = [_grid(report, metric, at, own_unit=True) for at, metric in places if at not in splits]
    gates = dict.fromkeys([lead, *policy.gates])
    return {
        "kept": [_grid(report, f"{gate}.kept", split) for gate in gates for split in forget],
        "raw": [] if report.is_compared else [_grid(report, lead, split) for split in forget],
        "utility": [
            _grid(report, f"{policy.utility}.share", split)._replace(floor=floors[split])
            for split in report.splits_of(*RETAINED_ROLES)
        ],
        "recovery": [_grid(report, f"{lead}.recovery", split, audited_only=True) for split in forget],
        "suite": [grid for grid in others if grid.split == SUITE],
        "general": [grid for grid in others if grid.split != SUITE],
        "surviving": [_grid(report, "update.surviving", WEIGHTS, audited_only=True)],
        "crossing": [_grid(report, "update.crossing", WEIGHTS, audited_only=True)],
        "surviving_layers": [_layer_grid(subject, "surviving") for subject in report.audited],
        "crossing_layers": [_layer_grid(subject, "crossing") for subject in report.audited],
    }


def _grid(report: AuditReport, metric: str, split: str, *, audited_only: bool = False, own_unit: bool = False) -> Grid:
    notes: list[str] = []
    variants = [v for v in report.variants if v != FULL or not metric.endswith(".recovery")]
    absent = NO_FORMAT if split == WEIGHTS else NOT_ASKED
    rows = [
        (subject.name, [_find(subject, variant, split, metric, notes, absent) for variant in variants])
        for subject in (report.audited if audited_only else report.subjects)
    ]
    return Grid(metric, split, rows, notes, own_unit)


def _layer_grid(subject: ReportSubject, number: str) -> Grid:
    """Return a number of a model's update, layers × variants, named after the model; empty with less than 2 layers."""
    prefix = f"update.{number}."
    found = [cell for cell in subject.cells if cell.metric.startswith(prefix)]
    metrics, variants = dict.fromkeys(c.metric for c in found), dict.fromkeys(c.variant for c in found)
    notes: list[str] = []
    rows = [
        (metric.removeprefix(prefix), [_find(subject, v, WEIGHTS, metric, notes, UNCHANGED) for v in variants])
        for metric in metrics
    ]
    return Grid(subject.name, WEIGHTS, rows if len(rows) > 1 else [], notes)


def _find(
    subject: ReportSubject, variant: str, split: str, metric: str, notes: list[str], absent: str
) -> Measured | Missing:
    """Return the subject's cell; one that was not measured gets its place in the list of reasons."""
    found = subject.by_place.get((variant, split, metric))
    if isinstance(found, Measured):
        return found
    reason = absent if found is None else found.not_measured
    if reason not in notes:
        notes.append(reason)
    return Missing(variant, reason, notes.index(reason) + 1)


class Axis(NamedTuple):
    """A linear scale from low to high with round ticks; `at` maps a number to percent of the width."""

    low: float
    high: float
    ticks: list[float]

    def at(self, value: float | None, otherwise: float = 0.0) -> float:
        return otherwise if value is None else round(4 + 92 * (value - self.low) / (self.high - self.low), 2)


def axis(grids: Iterable[Grid]) -> Axis:
    """Return one scale for all measured cells that always shows 0 and 1."""
    cells = [cell for grid in grids for _, row in grid.rows for cell in row if isinstance(cell, Measured)]
    ends = (end for cell in cells for end in (cell.low, cell.value, cell.high))
    numbers = [0.0, 1.0, *(end for end in ends if end is not None)]
    low, high, step = min(numbers), max(numbers), 0.25
    while (high - low) / step > 5:
        step *= 2
    return Axis(low, high, [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)])
