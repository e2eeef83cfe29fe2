"""Cells of a report: every number about one model, made from a table of scores."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from stillknows.auditing.comparing import compare
from stillknows.auditing.evidence import RETAINED_ROLES, CellKey, Table, mean, recovery, share
from stillknows.errors import NotMeasured
from stillknows.registry import Bound
from stillknows.types import CONTROL, FULL, SUITE, Cell, Observations


def cells(table: Table, label: str, variants: Collection[str], metrics: Mapping[str, Bound]) -> Iterator[Cell]:
    """Yield every number about one model: scores, knowledge kept, recovery, share of the original's, utility."""
    for variant in variants:
        for split, role in table.roles.items():
            place = CellKey(label, variant, split)
            for name, metric in metrics.items():
                if (place, name) not in table.scores:  # attacks are tried on what was to be forgotten
                    continue
                yield Cell(*place, name, mean(table, place, name))
                if metric.plugin.measures != "knowledge":
                    continue
                if role == "forget":
                    yield from _forget_cells(table, place, name)
                elif role in RETAINED_ROLES:
                    yield Cell(*place, f"{name}.share", share(table, place, name))


def aggregate_cells(
    observations: Mapping[CellKey, Observations], label: str, variants: Collection[str], figures: Mapping[str, Bound]
) -> Iterator[Cell]:
    """Yield the figures that a benchmark publishes, made of all splits of one model under each variant."""
    for variant in variants:
        subject, control = (
            {place.split: seen for place, seen in observations.items() if place[:2] == (model, variant)}
            for model in (label, CONTROL)
        )
        for name, figure in figures.items():
            try:
                numbers = figure(subject=subject, control=control or None)
            except NotMeasured as reason:
                numbers = {name: str(reason)}
            for number, value in numbers.items():
                yield Cell(label, variant, SUITE, number, value)


def _forget_cells(table: Table, place: CellKey, metric: str) -> Iterator[Cell]:
    compared = compare(table, place, metric)
    kept, known = (compared, compared) if isinstance(compared, str) else (compared.kept, compared.known)
    yield Cell(*place, f"{metric}.kept", kept)
    yield Cell(*place, f"{metric}.known_facts", known)
    yield Cell(*place, f"{metric}.recovery", recovery(table, place, metric))
    yield Cell(*place, f"{metric}.share", share(table, place, metric))
    yield Cell(*place, f"{metric}.share_of_full", share(table, place, metric, FULL))
