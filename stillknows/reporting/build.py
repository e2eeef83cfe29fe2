"""An audit's outcome as a report's data."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from stillknows import __version__
from stillknows.auditing.evidence import CellKey, is_known
from stillknows.gate.placebo import PlaceboTest
from stillknows.observations import observations_digest
from stillknows.reporting.schema import EXPECTED, NUM_LEAKS, SCHEMA_VERSION, AuditReport, Json, lead_of, parsed, worst
from stillknows.specs import spelled
from stillknows.types import CONTROL, FULL, ORIGINAL, Cell, Interval, Verdict

if TYPE_CHECKING:
    from stillknows.auditing.audit import Audit


def build(audit: Audit, command: str) -> AuditReport:
    """Return the report of an audit; controls come last. `command` is what the user typed, to repeat the audit."""
    request = audit.request
    metrics = spelled(request.metrics)
    lead = lead_of(metrics, request.policy.gates)
    verdicts = sorted(audit.verdicts, key=lambda verdict: verdict.subject in EXPECTED)
    content = {
        "schema_version": SCHEMA_VERSION,
        "stillknows": __version__,
        "verdict": worst((verdict.subject, verdict.name) for verdict in verdicts),
        "benchmark": request.benchmark.spec,
        "splits": [
            {"name": s.name, "role": s.role, "examples": len(s.examples), "facts": len({e.fact for e in s.examples})}
            for s in request.benchmark.splits
        ],
        "variants": list(audit.verdicts[0].variants),
        "left_out": [left._asdict() for left in audit.left_out],
        "out_of_reach": [asdict(finding) for finding in audit.out_of_reach],
        "metrics": metrics,
        "placebos": audit.placebos.counts() if audit.placebos else {},
        "policy": asdict(request.policy),
        "subjects": [_subject(audit, verdict, lead) for verdict in verdicts],
        "repeat": {"command": command, "versions": dict(audit.versions)},
    }
    return parsed(content, "what the audit found")


def _subject(audit: Audit, verdict: Verdict, lead: str) -> Json:
    label = verdict.subject
    return {
        "name": label,
        "path": audit.sources[label].name,
        "quantized": audit.sources[label].packing or None,
        "defence": audit.defences.get(label),
        "fingerprint": audit.fingerprints[label],
        "verdict": verdict.name,
        "findings": [asdict(finding) for finding in verdict.findings],
        "variants": verdict.variants,
        "observations": _digests(audit, label),
        "cells": [_cell(cell) for cell in audit.cells if cell.subject == label],
        "run": audit.records[label],
        "leaks": [] if label in EXPECTED else _leaks(audit, label, lead),
        "facts": _facts(audit.facts.get(label)),
        "depth": audit.depth[label].to_json() if label in audit.depth else None,
    }


def _facts(test: PlaceboTest | None) -> Json | None:
    """Return what the placebo test found."""
    if test is None:
        return None
    together = {name: found and found._asdict() for name, found in (("diffuse", test.diffuse), ("below", test.below))}
    parts = {"alpha": test.alpha, "diffuse_alpha": test.diffuse_alpha, "controls": test.controls}
    return {**parts, **together, "facts": [asdict(fact) for fact in test.facts]}


def _digests(audit: Audit, label: str) -> Json:
    """Return the digest of each of a model's observations, by variant and split."""
    found: Json = {}
    for place, seen in audit.observations.items():
        if place.model == label:
            found.setdefault(place.variant, {})[place.split] = observations_digest(seen)
    return found


def _cell(cell: Cell) -> Json:
    return {name: value for name, value in cell.to_json().items() if name != "subject"}


def _leaks(audit: Audit, label: str, metric: str) -> list[Json]:
    """Return the forget facts with the largest gain over the control, in the variant where the subject keeps most."""
    told = {f.variant for verdict in audit.verdicts for f in verdict.findings if f.kind == "answer_told"}
    kept = {
        CellKey(label, cell.variant, cell.split): cell.result.value
        for cell in audit.cells
        if cell.subject == label and cell.metric == f"{metric}.kept" and isinstance(cell.result, Interval)
        if cell.variant not in told
    }
    if not kept:
        return []
    place = max(kept, key=lambda place: kept[place])
    s, c, o = (audit.table.get(model, place.variant, place.split, metric) for model in (label, CONTROL, ORIGINAL))
    full = audit.table.scores.get((place._replace(variant=FULL), metric), np.empty(0))
    full = full if len(full) == len(s) else np.full_like(s, np.nan)  # an attack that teaches asks for fewer facts
    known = is_known(s, c, o)
    facts = [fact for fact in np.argsort(c - s, kind="stable").tolist() if s[fact] > c[fact]]
    return [
        _texts(audit, place, fact)
        | {
            "scores": {"original": o[fact], "control": c[fact], "full": full[fact], "variant": s[fact]},
            "known": bool(known[fact]),
        }
        for fact in facts[:NUM_LEAKS]
    ]


def _texts(audit: Audit, place: CellKey, fact: int) -> dict[str, Any]:
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
