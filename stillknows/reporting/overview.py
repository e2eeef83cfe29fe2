"""Verdict, knowledge kept and utility of every variant in one table: what fits on a screen of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from stillknows.auditing.evidence import MIN_GAP
from stillknows.formatting import for_markdown, number, table_of_texts
from stillknows.reporting.schema import AuditReport, Measured, ReportSubject, Unmeasured, expected
from stillknows.types import FULL, ORIGINAL, UNDEFENDED

SCREEN = 80  # columns of a terminal
NOT_ASKED = "not asked in this variant: attacks ask only what is to be forgotten"
LOW = "!"  # marks utility below the floor


def summary(report: AuditReport) -> str:
    """Return the verdicts, and knowledge kept beside utility in every variant: what fits on a screen, as Markdown."""
    after = [*unattacked(report), *left_out(report), *_on_disk(report), *_defended(report)]
    parts = [for_markdown(sentence(report)), *overview(report), *claim_tables(report)]
    return "\n\n".join([*parts, *map(for_markdown, after)])


def claim_tables(report: AuditReport) -> list[str]:
    """Return a table of models × claims, and what would settle those that are open, as Markdown."""
    rows = [[s.name, *(claim.verdict for claim in s.claims)] for s in report.audited if s.claims]
    if not rows:
        return []
    names = [claim.name for claim in next(s.claims for s in report.audited if s.claims)]
    open_claims = [(s, next((c for c in s.claims if c.settle), None)) for s in report.audited]
    settle = [for_markdown(f"{s.name}, {c.name}: {c.settle} would settle it.") for s, c in open_claims if c]
    return [table_of_texts(["claim", *names], rows), *settle]


def sentence(report: AuditReport) -> str:
    """Say the overall verdict and whom it concerns."""
    audited = report.audited
    if len(audited) == 1:
        return f"{audited[0].name} is {report.verdict}."
    worst = [subject.name for subject in audited if subject.verdict == report.verdict]
    return f"The worst verdict on {len(audited)} models is {report.verdict}: {', '.join(worst)}."


def left_out(report: AuditReport) -> list[str]:
    """Return one sentence for each deployed format that could not be tested."""
    return [f"{left.variant} was left out: {left.because}" for left in report.left_out]


def unattacked(report: AuditReport) -> list[str]:
    """Return a sentence where models pass as they are asked, and nobody tried to get at what they may hide."""
    passed = report.verdict == "FORGOTTEN" and not any(subject.attacks for subject in report.audited)
    return ["No attack was tried: a model that only hides what it knows may pass. The plan `quick` has some."] * passed


def _on_disk(report: AuditReport) -> list[str]:
    """Return a sentence for each model that was read from a quantized file."""
    forms = ((subject.name, subject.quantized) for subject in report.subjects)
    return [f"{name} is a quantized file, measured as it is: {form}." for name, form in forms if form]


def _defended(report: AuditReport) -> list[str]:
    """Return a sentence for each model whose weights are not what hides the knowledge."""
    return [
        f"{s.name} stands behind a defence ({s.defence}), which leaves the weights alone: see {UNDEFENDED}."
        for s in report.subjects
        if s.defence is not None
    ]


def overview(report: AuditReport) -> list[str]:
    """Return paragraphs of Markdown: what a cell holds, tables of variants × models, and notes.

    A cell shows the knowledge kept by the report's first metric; its score as it is where nothing could be compared.
    """
    lead, compared = report.lead, report.is_compared
    shown = [s for s in report.subjects if not s.is_control or (s.name == ORIGINAL and not compared)]
    metric, notes = f"{lead}.kept" if compared else lead, []
    first = ["variant", "verdict", *report.variants]
    columns = [
        [s.name, s.verdict, *(_cell(report, s, variant, metric, notes) for variant in report.variants)] for s in shown
    ]
    tables = [table_of_texts(*_header_and_rows([first, *some])) for some in _abreast(first, columns)]
    return [
        _legend(report),
        *tables,
        *(f"[{i}] not measured: {for_markdown(note)}" for i, note in enumerate(notes, 1)),
        *(_controls(report) if compared else _blind(report)),
    ]


def _abreast(first: Sequence[str], columns: Sequence[Sequence[str]]) -> list[list[Sequence[str]]]:
    """Part columns into tables that begin with the first one and fit a screen, or hold a single one that does not."""
    parts: list[list[Sequence[str]]] = []
    room = 0
    for column in columns:
        width = max(map(len, column)) + len(" | ")
        if width > room:
            parts.append([])
            room = SCREEN - len("| ") - max(map(len, first)) - len(" |")
        parts[-1].append(column)
        room -= width
    return parts


def _header_and_rows(columns: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    header, *rows = map(list, zip(*columns, strict=True))
    return header, rows


def _legend(report: AuditReport) -> str:
    policy, lead, splits = report.policy, report.lead, report.splits_of("forget")
    which = f" (the highest of {', '.join(splits)})" if len(splits) > 1 else ""
    if report.is_compared:
        lines = [
            f"Knowledge kept / utility, by {lead}{which}.",
            "Knowledge kept: 0 as never taught, 1 as the original.",
        ]
    else:
        lines = [
            f"Raw {lead}{which} / utility.",
            "Without a never-taught control only recited facts are decided.",
        ]
    by = "" if policy.utility == lead else f", by {policy.utility}"
    lines.append(f"Utility{by}: 1 as the original; {LOW} below the floor of {policy.utility_floor:g}.")
    return "\n".join(map(for_markdown, lines))


def _cell(report: AuditReport, subject: ReportSubject, variant: str, metric: str, notes: list[str]) -> str:
    """Return the highest score of any forget split and the lowest utility of any retain split, as "0.62 / 0.98"."""
    share = f"{report.policy.utility}.share"
    known = [_find(subject, variant, split, metric) for split in report.splits_of("forget")]
    retained = [_find(subject, variant, split, share) for split in report.splits_of("retain")]
    values = [_value(known, max, notes), *([_value(retained, min, notes)] if retained else [])]
    low = min((cell.value for cell in retained if isinstance(cell, Measured)), default=1.0)
    return " / ".join(values) + LOW * (low < report.policy.utility_floor)


def _value(cells: Sequence[Measured | Unmeasured], worst: Callable[[Iterable[float]], float], notes: list[str]) -> str:
    """Return the worst value, or the number of the note that says why one of them is missing."""
    missing = [cell.not_measured for cell in cells if isinstance(cell, Unmeasured)]
    if not missing:
        return number(worst(cell.value for cell in cells if isinstance(cell, Measured)))
    if missing[0] not in notes:
        notes.append(missing[0])
    return f"[{notes.index(missing[0]) + 1}]"


def _find(subject: ReportSubject, variant: str, split: str, metric: str) -> Measured | Unmeasured:
    absent = Unmeasured(variant=variant, split=split, metric=metric, not_measured=NOT_ASKED)
    return subject.by_place.get((variant, split, metric), absent)


def _blind(report: AuditReport) -> list[str]:
    """Say on which forget splits the original scores so little that no control could be told from it."""
    originals = [subject for subject in report.subjects if subject.name == ORIGINAL]
    found = [(split, _find(s, FULL, split, report.lead)) for s in originals for split in report.splits_of("forget")]
    low = [f"{number(c.value)} on {split}" for split, c in found if isinstance(c, Measured) and c.value <= MIN_GAP]
    first = for_markdown(f"The original scores {', '.join(low)}: asked like this, it shows no knowledge.")
    return [f"{first}\nA control would not help. Try another template, or other facts."] if low else []


def _controls(report: AuditReport) -> list[str]:
    """Say what verdicts the controls have, and where these are not as they should be."""
    found = {subject.name: subject.verdict for subject in report.subjects if subject.is_control}
    words = [
        f"{name} {verdict}" + (f" (should be {expected(name)})" if verdict != expected(name) else "")
        for name, verdict in found.items()
    ]
    return [f"Controls: {', '.join(words)}."]
