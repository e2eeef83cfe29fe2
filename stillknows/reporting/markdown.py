"""A report as Markdown that also reads well unrendered."""

from __future__ import annotations

from collections.abc import Iterator

from stillknows.auditing.findings import out_of_reach_words, sentences
from stillknows.formatting import code, for_markdown, percent, table_of_texts
from stillknows.reporting import depth, facts, membership
from stillknows.reporting.annex import NOTICE, annex
from stillknows.reporting.overview import LOW, summary
from stillknows.reporting.schema import AuditReport, Measured, ReportSubject
from stillknows.reporting.tables import Grid, Missing, grids, span, value_words
from stillknows.stats import LEVEL
from stillknows.types import SUITE

TITLES = {
    "kept": "Knowledge kept: 0 as never taught, 1 as the original",
    "raw": "Raw scores, since there is no control to compare with",
    "utility": f"Utility: 1 as good as the original, {LOW} below the floor that the verdict demands",
    "recovery": "Recovery: 0 nothing, 1 all of it",
    "suite": "Published figures",
    "general": "General utility",
}


def markdown(report: AuditReport) -> str:
    """Return the verdicts, the main tables and what the verdicts rest on."""
    verdicts = [[s.name, s.verdict, *(s.variants[variant] for variant in report.variants)] for s in report.subjects]
    parts = [f"# stillknows: {report.verdict}", summary(report), f"Benchmark: {code(report.benchmark)}"]
    parts += [part for subject in report.audited for part in _claims(subject)]
    parts += ["## Verdict by variant", table_of_texts(["model", "verdict", *report.variants], verdicts)]
    found = grids(report)
    for name, title in TITLES.items():
        parts += [f"## {title}"] if found[name] else []
        parts += [part for grid in found[name] for part in _table(grid)]
    parts += [*_facts(report), *_depth(report), *_membership(report)]
    parts += [f"In brackets: bounds, {percent(LEVEL)} each.", *_reasons(report), *_annex(report)]
    return "\n\n".join(parts) + "\n"


def _claims(subject: ReportSubject) -> Iterator[str]:
    """Yield what can be claimed of one model, with the evidence."""
    if subject.claims:
        yield f"## What can be claimed of {for_markdown(subject.name)}"
        rows = [[c.name, c.verdict, c.evidence, c.settle] for c in subject.claims]
        yield table_of_texts(["claim", "verdict", "evidence", "what would settle it"], rows)
        yield for_markdown(facts.counted(subject))


def _facts(report: AuditReport) -> Iterator[str]:
    """Yield what the placebo test found of each model, and the facts that it names."""
    if not report.placebos:
        return
    yield "## Fact by fact: true answers beside answers that could have been true"
    yield for_markdown(facts.sources(report))
    for subject in report.subjects:
        if subject.facts is None:
            continue
        yield for_markdown(f"{subject.name}: {facts.summary_of(subject.facts)}")
        if subject.facts.named and not subject.is_control:
            rows = [[f.fact, ", ".join(f.variants), f"{f.p:.2g}", str(f.placebos)] for f in subject.facts.named]
            yield table_of_texts(["named fact", "variants", "p", "placebos"], rows)


def _depth(report: AuditReport) -> Iterator[str]:
    """Yield what the hidden states of each model hold."""
    looked = [(subject.name, subject.depth) for subject in report.subjects if subject.depth]
    if looked:
        yield "## Depth: knowledge in the hidden states, 0 as the never-taught control, 1 as the original"
        rows = [[name, *map(depth.words, section.signals)] for name, section in looked]
        yield table_of_texts(["model", *(depth.NAMES[s.signal] for s in looked[0][1].signals)], rows)


def _membership(report: AuditReport) -> Iterator[str]:
    """Yield which examples of each model are called members."""
    found = [(subject.name, section) for subject in report.subjects for section in subject.membership]
    if found:
        yield "## Membership, example by example"
        rows = [[name, membership.NAMES[section.attack], membership.words(section)] for name, section in found]
        yield table_of_texts(["model", "attack", "what it finds"], rows)


def _table(grid: Grid) -> Iterator[str]:
    header = [_heading(grid), *(cell.variant for _, row in grid.rows[:1] for cell in row)]
    yield table_of_texts(header, [[name, *(_words(cell, grid) for cell in row)] for name, row in grid.rows])
    yield from (f"[{i}] {for_markdown(note)}" for i, note in enumerate(grid.notes, 1))


def _heading(grid: Grid) -> str:
    if grid.own_unit:
        return grid.metric if grid.split == SUITE else f"{grid.split}: {grid.metric}"
    return f"{grid.metric.rpartition('.')[0] or grid.metric}, {grid.split}"


def _words(cell: Measured | Missing, grid: Grid) -> str:
    if isinstance(cell, Missing):
        return f"not measured [{cell.note}]"
    return f"{value_words(cell, grid.own_unit)}{LOW * grid.is_low(cell)} ({span(cell, grid.own_unit)})"


def _annex(report: AuditReport) -> Iterator[str]:
    yield "## Appendix: what opinions and codes name"
    yield NOTICE
    rows = [[row.source, row.about, row.status, row.reason or ", ".join(row.by)] for row in annex(report)]
    yield table_of_texts(["source", "names", "here", "by"], rows)


def _reasons(report: AuditReport) -> Iterator[str]:
    yield "## What the verdicts rest on"
    if report.out_of_reach:
        yield for_markdown(f"{out_of_reach_words(report.out_of_reach)}.")
    for subject in report.subjects:
        yield f"### {for_markdown(subject.name)}: {subject.verdict}"
        yield from (f"- {for_markdown(sentence)}" for sentence in sentences(subject.findings))
