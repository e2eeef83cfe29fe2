"""Charts of a report's page: how facts rank among their placebos, and what relearning brings back."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stillknows.formatting import number
from stillknows.labels import is_control
from stillknows.reporting.chart import ChartAxis, Mark, Series, chart, unit_axis
from stillknows.reporting.schema import AuditReport, Measured, ReportSubject
from stillknows.types import FULL

NAMED_MOST = 6  # facts whose names stand beside their points
RELEARNING = re.compile(r"relearn(:[^+]*)?")
STEPS = re.compile(r":steps=\d+")
SHARES = ChartAxis("facts, in the order of their ranks", 0.0, 1.0, ())


def rank_chart(subject: ReportSubject, report: AuditReport) -> str:
    """Return how a model's true answers rank among their placebos, beside its controls; "" where nothing was ranked.

    Sorted ranks of a model that was never taught lie around the diagonal.
    """
    names = [subject, *(other for other in report.subjects if is_control(other.name))]
    series = [Series(one.name, _ranks(one, named=one is subject)) for one in names]
    if not series[0].marks:
        return ""
    diagonal = Series("never taught, on average", (Mark(0.0, 0.0), Mark(1.0, 1.0)), joined=True)
    mean = sum(mark.y for mark in series[0].marks) / len(series[0].marks)
    count = len(series[0].marks)
    said = f"{count} facts of {subject.name}; on average a true answer stands out from {number(mean)} of "
    y = unit_axis("share of placebos beaten", [])
    title = f"True answers of {subject.name} among their placebos"
    return _inline(chart(title, f"{said}its placebos, ½ where never taught", SHARES, y, [*series, diagonal]))


def _ranks(subject: ReportSubject, *, named: bool) -> tuple[Mark, ...]:
    facts = subject.facts.facts if subject.facts else ()
    ranked = sorted((1 - fact.likelier, fact.fact, fact.named) for fact in facts if fact.likelier is not None)
    labelled = [name for _, name, is_named in ranked if is_named][-NAMED_MOST:] if named else []
    return tuple(
        Mark((i + 0.5) / len(ranked), beaten, label=name if name in labelled else "")
        for i, (beaten, name, _) in enumerate(ranked)
    )


def relearning_charts(report: AuditReport) -> list[str]:
    """Return, for each way of relearning that was tried at several lengths, the scores of all models by steps."""
    split = report.splits_of("forget")[0]
    charts: list[str] = []
    for way, variants in _ways(report).items():
        marks = {one.name: tuple(_relearned(one, variants, split, report.lead)) for one in report.subjects}
        lines = [Series(name, found, joined=True) for name, found in marks.items() if len(found) > 1]
        if not lines:
            continue
        most = max(mark.x for line in lines for mark in line.marks)
        steps = sorted({mark.x for line in lines for mark in line.marks})
        x = ChartAxis("steps of relearning", 0.0, most, tuple((step, f"{step:g}") for step in steps))
        y = unit_axis(f"{report.lead} on {split}", [])
        said = "; ".join(
            f"{line.name}: {', '.join(f'{number(mark.y)} after {mark.x:g}' for mark in line.marks)}" for line in lines
        )
        charts.append(_inline(chart(f"What {way} brings back", said, x, y, lines)))
    return charts


def _ways(report: AuditReport) -> dict[str, list[str]]:
    """Return the variants that do nothing but relearn, by all of their options but steps, where there are several."""
    found: dict[str, list[str]] = {}
    for variant in report.variants:
        if RELEARNING.fullmatch(variant):
            found.setdefault(STEPS.sub("", variant), []).append(variant)
    return {way: variants for way, variants in found.items() if len(variants) > 1}


def _relearned(subject: ReportSubject, variants: list[str], split: str, metric: str) -> Iterator[Mark]:
    steps = {FULL: 0} | {variant: subject.attacks[variant].steps for variant in variants if variant in subject.attacks}
    for variant, count in sorted(steps.items(), key=lambda item: item[1]):
        cell = subject.by_place.get((variant, split, metric))
        if isinstance(cell, Measured):
            yield Mark(float(count), cell.value, cell.low, cell.high)


def _inline(svg: str) -> str:
    """Return a chart as a part of a page, which needs no address of its format."""
    return svg.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
