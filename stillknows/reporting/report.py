"""An audit as a report: JSON for programs, one self-contained HTML page for people, Markdown for terminals and logs.

Everything that is shown is made from the JSON data, so a saved report can be rendered again without the models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from json import JSONEncoder
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined

from stillknows import __version__
from stillknows.auditing import findings
from stillknows.auditing.evidence import KEPT_ROLES, KNOWN_SHARE, LEAST_GAP, CellKey
from stillknows.errors import UserError
from stillknows.formatting import code, for_markdown, for_terminal, number, percent, significant, table_of_texts
from stillknows.observations import OBSERVATIONS, load_observations, observations_digest
from stillknows.reporting.overview import LOW, NOT_ASKED, overview
from stillknows.specs import spelled
from stillknows.stats import LEVEL
from stillknows.store import AGAIN, locked, parse_json, read_sealed, slug, write_sealed, write_text
from stillknows.types import CONTROL, FULL, ORIGINAL, SUITE, UNWRAPPED, WEIGHTS, Cell, Finding, Interval, VerdictName

if TYPE_CHECKING:
    from stillknows.auditing.audit import Audit

SCHEMA_VERSION = 2
JSON, HTML, MARKDOWN = "report.json", "report.html", "report.md"
SCHEMA = "report.schema.json"
NUM_LEAKS = 10
LEAD = "answer_probability"  # shown first where it was measured: the gate that a reader grasps at once
SEVERITY: tuple[VerdictName, ...] = ("FORGOTTEN", "UNDECIDED", "DAMAGED", "HIDDEN", "STILL KNOWS")
EXPECTED: Mapping[str, VerdictName] = {ORIGINAL: "STILL KNOWS", CONTROL: "FORGOTTEN"}
NO_FORMAT = "weights are compared in formats alone"
UNCHANGED = "nothing that the format rounds was changed here"
TITLES = {
    "kept": "Knowledge kept: 0 as never taught, 1 as the original",
    "raw": "Raw scores, since there is no control to compare with",
    "utility": f"Utility: 1 as good as the original, {LOW} below the floor that the verdict demands",
    "recovery": "Recovery: 0 nothing, 1 all of it",
    "suite": "Published figures",
    "general": "General utility",
}
Json = dict[str, Any]


def build(audit: Audit, command: str) -> Json:
    """Return the report as JSON-able data, as report.schema.json describes it; controls come last.

    `command` is what the user typed, to repeat the audit.
    """
    request = audit.request
    metrics = spelled(request.metrics)
    lead = _lead(metrics, request.policy.gates)
    subjects = [
        {
            "name": verdict.subject,
            "path": audit.sources[verdict.subject].name,
            "quantized": audit.sources[verdict.subject].form or None,
            "fingerprint": audit.fingerprints[verdict.subject],
            "verdict": verdict.name,
            "findings": [asdict(finding) for finding in verdict.findings],
            "variants": verdict.variants,
            OBSERVATIONS: _digests(audit, verdict.subject),
            "cells": [_cell(cell) for cell in audit.cells if cell.subject == verdict.subject],
            "run": audit.records[verdict.subject],
            "leaks": [] if verdict.subject in EXPECTED else _leaks(audit, verdict.subject, lead),
        }
        | _suppression(audit, verdict.subject)
        for verdict in sorted(audit.verdicts, key=lambda verdict: verdict.subject in EXPECTED)
    ]
    report = {
        "schema_version": SCHEMA_VERSION,
        "stillknows": __version__,
        "verdict": _worst(subjects),
        "benchmark": request.benchmark.spec,
        "splits": [
            {"name": s.name, "role": s.role, "examples": len(s.examples), "facts": len({e.fact for e in s.examples})}
            for s in request.benchmark.splits
        ],
        "variants": list(audit.verdicts[0].variants),
        "left_out": [left._asdict() for left in audit.left_out],
        "out_of_reach": [asdict(finding) for finding in audit.out_of_reach],
        "metrics": metrics,
        "policy": asdict(request.policy),
        "subjects": subjects,
        "repeat": {"command": command, "versions": dict(audit.versions)},
    }
    return _json_able(report)


def write(report: Json, folder: Path) -> Json:
    """Write report.json, report.html and report.md into a folder, each in one step; return the JSON as written."""
    with locked(folder):
        write_text(folder / HTML, html(report))
        write_text(folder / MARKDOWN, markdown(report))
        return write_sealed(folder / JSON, report)


def read(folder: Path) -> Json:
    """Return the report that a folder holds.

    Raises UserError when there is none, when it was changed since or does not follow report.schema.json, and when the
    observations beside it are not those that it was made of.
    """
    report = read_sealed(folder / JSON)
    if report.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder / JSON} is not a report of schema version {SCHEMA_VERSION}",
            "run the audit again with this version; saved observations are used again where they still hold",
        )
    _require_valid(report, folder / JSON)
    for place, digest in observed(report).items():
        file = folder / OBSERVATIONS / place.model / slug(place.variant) / f"{place.split}.npz"
        seen = load_observations(file)
        if file.is_file() and (seen is None or observations_digest(seen) != digest):
            raise UserError(f"{file} is not what {JSON} was made of", AGAIN)
    return report


def observed(report: Json) -> dict[CellKey, str]:
    """Return the digests of the observations that a report was made of."""
    return {
        CellKey(subject["name"], variant, split): digest
        for subject in report["subjects"]
        for variant, splits in subject[OBSERVATIONS].items()
        for split, digest in splits.items()
    }


def _require_valid(report: Json, file: Path) -> None:
    """Raise UserError that names the first place where a report does not follow the schema, or contradicts itself."""
    from jsonschema import Draft202012Validator

    schema = parse_json(files("stillknows.reporting").joinpath(SCHEMA).read_text(encoding="utf-8"), SCHEMA)
    for error in Draft202012Validator(schema).iter_errors(report):
        raise UserError(f"{file} is not a report: {error.json_path} is not what belongs there", AGAIN)
    if report["verdict"] != _worst(report["subjects"]):
        raise UserError(f"{file} is not a report: its verdict is not the worst of its models'", AGAIN)
    if any(list(subject["variants"]) != report["variants"] for subject in report["subjects"]):
        raise UserError(f"{file} is not a report: its models were judged in other variants", AGAIN)


def _worst(subjects: Sequence[Json]) -> VerdictName:
    return max((s["verdict"] for s in _audited(subjects)), key=SEVERITY.index, default="UNDECIDED")


def _digests(audit: Audit, label: str) -> Json:
    """Return the digest of each of a model's observations, by variant and split."""
    found: Json = {}
    for place, seen in audit.observations.items():
        if place.model == label:
            found.setdefault(place.variant, {})[place.split] = observations_digest(seen)
    return found


def _suppression(audit: Audit, label: str) -> Json:
    found = audit.suppressions.get(label)
    return {} if found is None else {"suppression": found}


def _cell(cell: Cell) -> Json:
    return {name: value for name, value in cell.to_json().items() if name != "subject"}


def _json_able(value: Any) -> Any:
    """Return the value with lists for tuples and null for numbers that JSON has no form for (NaN, infinite bounds)."""
    if isinstance(value, Mapping):
        return {name: _json_able(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json_able(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lead(metrics: Sequence[str], gates: Sequence[str]) -> str:
    """Name the metric that is shown first."""
    return LEAD if LEAD in metrics else gates[0]


def _leaks(audit: Audit, label: str, metric: str) -> list[Json]:
    """Return the forget facts with the largest gain over the control, in the variant where the subject keeps most."""
    kept = {
        CellKey(label, cell.variant, cell.split): cell.result.value
        for cell in audit.cells
        if cell.subject == label and cell.metric == f"{metric}.kept" and isinstance(cell.result, Interval)
    }
    if not kept:
        return []
    place = max(kept, key=lambda place: kept[place])
    s, c, o = (audit.table.get(model, place.variant, place.split, metric) for model in (label, CONTROL, ORIGINAL))
    full = audit.table.scores.get((place._replace(variant=FULL), metric), np.empty(0))
    full = full if len(full) == len(s) else np.full_like(s, np.nan)  # an attack that teaches asks for fewer facts
    facts = [fact for fact in np.argsort(c - s, kind="stable").tolist() if s[fact] > c[fact]]
    return [
        _texts(audit, place, fact)
        | {
            "scores": {"original": o[fact], "control": c[fact], "full": full[fact], "variant": s[fact]},
            "known": bool(s[fact] - c[fact] > KNOWN_SHARE * (o[fact] - c[fact]) and o[fact] - c[fact] > LEAST_GAP),
        }
        for fact in facts[:NUM_LEAKS]
    ]


def _texts(audit: Audit, place: CellKey, fact: int) -> Json:
    """Return what was asked and answered about a fact (its place in the table), in the wording that leaks most."""
    seen, full = audit.observations[place], audit.observations.get(place._replace(variant=FULL))
    _, rows = np.unique(seen.facts, return_inverse=True)
    if full is not None and full.ids != seen.ids:  # an attack may ask for fewer facts, or in several wordings
        full = None
    log_probs, said, said_full = seen.log_probs or (), seen.generations or (), (full and full.generations) or ()
    i = max(np.flatnonzero(rows == fact).tolist(), key=lambda i: log_probs[i].mean())
    return {
        "variant": place.variant,
        "split": place.split,
        "id": seen.ids[i],
        "question": seen.prompts[i],
        "truth": seen.answers[i],
        "generated": said[i] if said else None,
        "generated_full": said_full[i] if said_full else None,
    }


def value_words(cell: Json, own_unit: bool = False) -> str:
    """Return the value of a measured cell: shares with two decimals, numbers of an own unit in their own size."""
    return _written(own_unit)(cell["value"])


def span(cell: Json, own_unit: bool = False) -> str:
    """Return the bounds of a measured cell in words."""
    written = _written(own_unit)
    return f"{written(cell['low'], '−∞')} to {written(cell['high'], '∞')}"


def _written(own_unit: bool) -> Callable[..., str]:
    return significant if own_unit else number


class Grid(NamedTuple):
    """One metric on one split, models × variants. Unmeasured cells carry the number of their reason in `notes`.

    `own_unit`: published figures and general tasks have units and directions of their own; all else is a share.
    `floor`: below it a value is marked; None for what has none.
    """

    metric: str
    split: str
    rows: list[tuple[str, list[Json]]]
    notes: list[str]
    own_unit: bool = False
    floor: float | None = None

    def is_low(self, cell: Json) -> bool:
        """Tell whether a measured value lies below the floor."""
        return self.floor is not None and cell["value"] < self.floor


def _audited(subjects: Sequence[Json]) -> list[Json]:
    return [subject for subject in subjects if subject["name"] not in EXPECTED]


def _grid(report: Json, metric: str, split: str, *, audited_only: bool = False, own_unit: bool = False) -> Grid:
    notes: list[str] = []
    subjects = _audited(report["subjects"]) if audited_only else report["subjects"]
    variants = [v for v in report["variants"] if v != FULL or not metric.endswith(".recovery")]
    absent = NO_FORMAT if split == WEIGHTS else NOT_ASKED
    rows = [(s["name"], [_find(s, variant, split, metric, notes, absent) for variant in variants]) for s in subjects]
    return Grid(metric, split, rows, notes, own_unit)


def _layer_grid(subject: Json, number: str) -> Grid:
    """Return a number of a model's update, layers × variants, named after the model; empty with less than 2 layers."""
    prefix = f"update.{number}."
    found = [c for c in subject["cells"] if c["metric"].startswith(prefix)]
    metrics, variants = dict.fromkeys(c["metric"] for c in found), dict.fromkeys(c["variant"] for c in found)
    notes: list[str] = []
    rows = [
        (metric.removeprefix(prefix), [_find(subject, v, WEIGHTS, metric, notes, UNCHANGED) for v in variants])
        for metric in metrics
    ]
    return Grid(subject["name"], WEIGHTS, rows if len(rows) > 1 else [], notes)


def _find(subject: Json, variant: str, split: str, metric: str, notes: list[str], absent: str) -> Json:
    """Return the subject's cell with its variant; one that was not measured gets its place in the list of reasons."""
    key = (variant, split, metric)
    found = next((c for c in subject["cells"] if (c["variant"], c["split"], c["metric"]) == key), {})
    if "value" in found:
        return found
    reason = found.get("not_measured", absent)
    if reason not in notes:
        notes.append(reason)
    return {"variant": variant, "not_measured": reason, "note": notes.index(reason) + 1}


def _grids(report: Json) -> dict[str, list[Grid]]:
    """Return the tables of a report: knowledge kept per gate (the lead first), utility, recovery, numbers of others'
    making, the update's fate. What is measured neither on a split nor on weights is a general task.
    """
    policy, lead = report["policy"], _lead(report["metrics"], report["policy"]["gates"])
    forget = [split["name"] for split in report["splits"] if split["role"] == "forget"]
    floors = {s["name"]: policy["utility_floor"] if s["role"] == "retain" else None for s in report["splits"]}
    keep = [split["name"] for split in report["splits"] if split["role"] in KEPT_ROLES]
    has_control = any(subject["name"] == CONTROL for subject in report["subjects"])
    splits = {WEIGHTS, *(split["name"] for split in report["splits"])}
    places = dict.fromkeys((c["split"], c["metric"]) for s in report["subjects"] for c in s["cells"])
    others = [_grid(report, metric, at, own_unit=True) for at, metric in places if at not in splits]
    gates, audited = dict.fromkeys([lead, *policy["gates"]]), _audited(report["subjects"])
    return {
        "kept": [_grid(report, f"{gate}.kept", split) for gate in gates for split in forget],
        "raw": [] if has_control else [_grid(report, lead, split) for split in forget],
        "utility": [_grid(report, f"{policy['utility']}.ratio", at)._replace(floor=floors[at]) for at in keep],
        "recovery": [_grid(report, f"{lead}.recovery", split, audited_only=True) for split in forget],
        "suite": [grid for grid in others if grid.split == SUITE],
        "general": [grid for grid in others if grid.split != SUITE],
        "surviving": [_grid(report, "update.surviving", WEIGHTS, audited_only=True)],
        "crossing": [_grid(report, "update.crossing", WEIGHTS, audited_only=True)],
        "surviving_layers": [_layer_grid(subject, "surviving") for subject in audited],
        "crossing_layers": [_layer_grid(subject, "crossing") for subject in audited],
    }


class Axis(NamedTuple):
    """A linear scale from low to high with round ticks; `at` maps a number to percent of the width."""

    low: float
    high: float
    ticks: list[float]

    def at(self, value: float | None, otherwise: float = 0.0) -> float:
        return otherwise if value is None else round(4 + 92 * (value - self.low) / (self.high - self.low), 2)


def _axis(grids: Iterable[Grid]) -> Axis:
    """Return one scale for all measured cells that always shows 0 and 1."""
    cells = [cell for grid in grids for _, row in grid.rows for cell in row if "value" in cell]
    numbers = [0.0, 1.0, *(cell[end] for cell in cells for end in ("low", "value", "high") if cell[end] is not None)]
    low, high, step = min(numbers), max(numbers), 0.25
    while (high - low) / step > 5:
        step *= 2
    return Axis(low, high, [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)])


def _unmeasured(report: Json) -> list[Json]:
    """Return the cells without a number, but not recovery in full precision, which has none by definition."""
    cells = [c | {"model": s["name"]} for s in report["subjects"] for c in s["cells"] if "not_measured" in c]
    return [c for c in cells if c["variant"] != FULL or not c["metric"].endswith(".recovery")]


def _sentence(report: Json) -> str:
    """Say the overall verdict and whom it concerns."""
    audited = _audited(report["subjects"])
    if len(audited) == 1:
        return f"{audited[0]['name']} is {report['verdict']}."
    worst = [s["name"] for s in audited if s["verdict"] == report["verdict"]]
    return f"The worst verdict on {len(audited)} models is {report['verdict']}: {', '.join(worst)}."


def _on_disk(report: Json) -> list[str]:
    """Return a sentence for each model that was read from a quantized file."""
    forms = ((subject["name"], subject.get("quantized")) for subject in report["subjects"])
    return [f"{name} is a quantized file, measured as it is: {form}." for name, form in forms if form]


def _suppressed(report: Json) -> list[str]:
    """Return a sentence for each model whose weights are not what hides the knowledge."""
    return [
        f"{s['name']} is a suppression ({s['suppression']}), which leaves the weights alone: see {UNWRAPPED}."
        for s in report["subjects"]
        if "suppression" in s
    ]


def _left_out(report: Json) -> list[str]:
    """Return one sentence for each deployed format that could not be tested."""
    return [f"{left['variant']} was left out: {left['because']}" for left in report["left_out"]]


def _sentences(found: Sequence[Json]) -> list[str]:
    """Return what findings say, in words."""
    return findings.sentences(Finding(**finding) for finding in found)


def _out_of_reach(report: Json) -> str:
    return findings.out_of_reach_words(Finding(**finding) for finding in report["out_of_reach"])


def name_parts(name: str) -> list[str]:
    """Return a variant's name in the parts between which a line may end: after what joins them, not within a word."""
    return re.split(r"(?<=[:+,])", for_terminal(name))


def html(report: Json) -> str:
    """Return one page that needs no network and no script; all data in it is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = lambda value: for_terminal(value) if type(value) is str else value  # bidi codes above all
    pretty = JSONEncoder(indent=1, ensure_ascii=False).encode
    environment.filters |= {
        "number": number,
        "value_words": value_words,
        "span": span,
        "percent": percent,
        "pretty": pretty,
        "name_parts": name_parts,
        "sentences": _sentences,
    }
    grids = _grids(report)
    fixed = {"expected": EXPECTED, "level": LEVEL, "known_share": KNOWN_SHARE, "least_gap": LEAST_GAP}
    made = {"sentence": _sentence(report), "grids": grids, "axis": _axis(grids["recovery"])}
    made |= {"left_out": _left_out(report), "out_of_reach": _out_of_reach(report)}
    template = environment.from_string(
        files("stillknows.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(report=report, unmeasured=_unmeasured(report), **made, **fixed).lstrip()


def summary(report: Json) -> str:
    """Return the verdicts, and knowledge kept beside utility in every variant: what fits on a screen, as Markdown."""
    table = overview(report, _lead(report["metrics"], report["policy"]["gates"]), EXPECTED)
    after = [*_left_out(report), *_on_disk(report), *_suppressed(report)]
    return "\n\n".join([for_markdown(_sentence(report)), *table, *map(for_markdown, after)])


def markdown(report: Json) -> str:
    """Return the verdicts and the main tables as Markdown that also reads well unrendered."""
    verdicts = [[s["name"], s["verdict"], *s["variants"].values()] for s in report["subjects"]]
    parts = [f"# stillknows: {report['verdict']}", summary(report), f"Benchmark: {code(report['benchmark'])}"]
    parts += ["## Verdict by variant", table_of_texts(["model", "verdict", *report["variants"]], verdicts)]
    for name, title in TITLES.items():
        grids = _grids(report)[name]
        parts += [f"## {title}"] if grids else []
        for grid in grids:
            header = [_heading(grid), *(cell["variant"] for _, row in grid.rows[:1] for cell in row)]
            rows = [[name, *(_words(cell, grid) for cell in row)] for name, row in grid.rows]
            notes = [f"[{i}] {for_markdown(note)}" for i, note in enumerate(grid.notes, 1)]
            parts += [table_of_texts(header, rows), *notes]
    parts += [f"In brackets: bounds, {percent(LEVEL)} each.", "## What the verdicts rest on"]
    parts += [for_markdown(f"{_out_of_reach(report)}.")] if report["out_of_reach"] else []
    for subject in report["subjects"]:
        parts += [f"### {for_markdown(subject['name'])}: {subject['verdict']}"]
        parts += [f"- {for_markdown(sentence)}" for sentence in _sentences(subject["findings"])]
    return "\n\n".join(parts) + "\n"


def _heading(grid: Grid) -> str:
    if grid.own_unit:
        return grid.metric if grid.split == SUITE else f"{grid.split}: {grid.metric}"
    return f"{grid.metric.rpartition('.')[0] or grid.metric}, {grid.split}"


def _words(cell: Json, grid: Grid) -> str:
    if "value" not in cell:
        return f"not measured [{cell['note']}]"
    return f"{value_words(cell, grid.own_unit)}{LOW * grid.is_low(cell)} ({span(cell, grid.own_unit)})"
