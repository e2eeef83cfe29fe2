"""Verdict, knowledge kept and utility of every variant in one table: what fits on a screen of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillknows.auditing.evidence import LEAST_GAP
from stillknows.formatting import for_markdown, number, table_of_texts
from stillknows.types import CONTROL, FULL, ORIGINAL

Json = Mapping[str, Any]
SCREEN = 80  # columns of a terminal
NOT_ASKED = "not asked in this variant: attacks ask only what is to be forgotten"
LOW = "!"  # marks utility below the floor


def overview(report: Json, lead: str, expected: Mapping[str, str]) -> list[str]:
    """Return paragraphs of Markdown: what a cell holds, tables of variants × models, and notes.

    Args:
        report: see report.schema.json.
        lead: the gate whose knowledge kept is shown; its score as it is where no control was audited.
        expected: the verdicts that the controls should have.
    """
    has_control = any(subject["name"] == CONTROL for subject in report["subjects"])
    shown = [s for s in report["subjects"] if s["name"] not in expected or (s["name"] == ORIGINAL and not has_control)]
    metric, notes = f"{lead}.kept" if has_control else lead, []
    first = ["variant", "verdict", *report["variants"]]
    columns = [
        [s["name"], s["verdict"], *(_cell(report, s, variant, metric, notes) for variant in report["variants"])]
        for s in shown
    ]
    tables = [table_of_texts(*_header_and_rows([first, *some])) for some in _abreast(first, columns)]
    return [
        _legend(report, lead, has_control),
        *tables,
        *(f"[{i}] not measured: {for_markdown(note)}" for i, note in enumerate(notes, 1)),
        *(_controls(report, expected) if has_control else _blind(report, lead)),
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


def _legend(report: Json, lead: str, has_control: bool) -> str:
    policy = report["policy"]
    splits = _splits(report, "forget")
    which = f" (the highest of {', '.join(splits)})" if len(splits) > 1 else ""
    if has_control:
        lines = [
            f"Knowledge kept / utility, by {lead}{which}.",
            "Knowledge kept: 0 as never taught, 1 as the original.",
        ]
    else:
        lines = [
            f"Raw {lead}{which} / utility.",
            "Without a never-taught control nothing is decided: compare with the original.",
        ]
    by = "" if policy["utility"] == lead else f", by {policy['utility']}"
    lines.append(f"Utility{by}: 1 as the original; {LOW} below the floor of {policy['utility_floor']:g}.")
    return "\n".join(map(for_markdown, lines))


def _cell(report: Json, subject: Json, variant: str, metric: str, notes: list[str]) -> str:
    """Return the highest score of any forget split and the lowest utility of any retain split, as "0.62 / 0.98"."""
    policy = report["policy"]
    known = [_find(subject, variant, split, metric) for split in _splits(report, "forget")]
    kept = [_find(subject, variant, split, f"{policy['utility']}.ratio") for split in _splits(report, "retain")]
    values = [_value(known, max, notes), _value(kept, min, notes)] if kept else [_value(known, max, notes)]
    low = min((cell["value"] for cell in kept if "value" in cell), default=1.0) < policy["utility_floor"]
    return " / ".join(values) + LOW * low


def _value(cells: Sequence[Json], worst: Any, notes: list[str]) -> str:
    measured = [cell["value"] for cell in cells if "value" in cell]
    if len(measured) == len(cells):
        return number(worst(measured))
    reason = next(cell["not_measured"] for cell in cells if "value" not in cell)
    if reason not in notes:
        notes.append(reason)
    return f"[{notes.index(reason) + 1}]"


def _find(subject: Json, variant: str, split: str, metric: str) -> Json:
    key = (variant, split, metric)
    found = (cell for cell in subject["cells"] if (cell["variant"], cell["split"], cell["metric"]) == key)
    return next(found, {"not_measured": NOT_ASKED})


def _splits(report: Json, role: str) -> list[str]:
    return [split["name"] for split in report["splits"] if split["role"] == role]


def _blind(report: Json, lead: str) -> list[str]:
    """Say on which forget splits the original scores so little that no control could be told from it."""
    originals = [subject for subject in report["subjects"] if subject["name"] == ORIGINAL]
    found = [(split, _find(s, FULL, split, lead)) for s in originals for split in _splits(report, "forget")]
    low = [f"{number(cell['value'])} on {split}" for split, cell in found if cell.get("value", 1) <= LEAST_GAP]
    first = for_markdown(f"The original scores {', '.join(low)}: asked like this, it shows no knowledge.")
    return [f"{first}\nA control would not help. Try another template, or other facts."] if low else []


def _controls(report: Json, expected: Mapping[str, str]) -> list[str]:
    """Say what verdicts the controls have, and where these are not as they should be."""
    found = {s["name"]: s["verdict"] for s in report["subjects"] if s["name"] in expected}
    words = [
        f"{name} {verdict}" + (f" (should be {expected[name]})" if verdict != expected[name] else "")
        for name, verdict in found.items()
    ]
    return [f"Controls: {', '.join(words)}."]
