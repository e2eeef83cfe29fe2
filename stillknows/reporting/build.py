"""An audit's outcome as a report's data."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from stillknows import __version__
from stillknows.gate.membership import MembershipAttack
from stillknows.gate.placebo import PlaceboTest
from stillknows.labels import is_reference
from stillknows.observations import observations_digest
from stillknows.reporting.leaked import drawn, exposed, leaks
from stillknows.reporting.schema import SCHEMA_VERSION, AuditReport, Json, lead_of, parsed, worst
from stillknows.specs import spelled
from stillknows.types import Cell, Verdict

if TYPE_CHECKING:
    from stillknows.auditing.audit import Audit


def build(audit: Audit, command: str) -> AuditReport:
    """Return the report of an audit; controls come last. `command` is what the user typed, to repeat the audit."""
    request = audit.request
    metrics = spelled(request.metrics)
    lead = lead_of(metrics, request.policy.gates)
    verdicts = sorted(audit.verdicts, key=lambda verdict: is_reference(verdict.subject))
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
        "claims": [] if is_reference(label) else [asdict(claim) for claim in verdict.claims],
        "single_facts": [asdict(fact) for fact in verdict.facts],
        "variants": verdict.variants,
        "observations": _digests(audit, label),
        "cells": [_cell(cell) for cell in audit.cells if cell.subject == label],
        "run": audit.records[label],
        "leaks": [] if is_reference(label) else leaks(audit, label, lead),
        "exposed": [] if is_reference(label) else exposed(audit, verdict, lead),
        "drawn": [] if is_reference(label) else drawn(audit, verdict),
        "attacks": {variant: asdict(record) for variant, record in audit.attacks.get(label, {}).items()},
        "facts": _facts(audit.facts.get(label)),
        "membership": [_membership(*found) for found in audit.membership.get(label, {}).items()],
        "depth": audit.depth[label].to_json() if label in audit.depth else None,
    }


def _facts(test: PlaceboTest | None) -> Json | None:
    """Return what the placebo test found."""
    if test is None:
        return None
    together = {name: found and found._asdict() for name, found in (("diffuse", test.diffuse), ("below", test.below))}
    parts = {"alpha": test.alpha, "diffuse_alpha": test.diffuse_alpha, "controls": test.controls}
    return {**parts, **together, "facts": [asdict(fact) for fact in test.facts]}


def _membership(name: str, found: MembershipAttack | str) -> Json:
    """Return what one attack says of one model's examples."""
    if isinstance(found, str):
        return {"attack": name, "not_measured": found, "auc": None, "examples": []}
    examples = [example._asdict() for example in found.examples]
    return {"attack": name, "not_measured": None, "auc": list(found.auc[:3]), "examples": examples}


def _digests(audit: Audit, label: str) -> Json:
    """Return the digest of each of a model's observations, by variant and split."""
    found: Json = {}
    for place, seen in audit.observations.items():
        if place.model == label:
            found.setdefault(place.variant, {})[place.split] = observations_digest(seen)
    return found


def _cell(cell: Cell) -> Json:
    return {name: value for name, value in cell.to_json().items() if name != "subject"}
