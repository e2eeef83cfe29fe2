"""Models x variants x splits -> saved observations -> cells and verdicts. An interrupted audit resumes where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillknows.auditing import evidence
from stillknows.auditing.attack_record import AttackRecord
from stillknows.auditing.cells import aggregate_cells
from stillknows.auditing.cells import cells as make_cells
from stillknows.auditing.claims import AttackOn
from stillknows.auditing.collect import Keys, collected, missing, observe_missing, recorded
from stillknows.auditing.controls import failing_controls
from stillknows.auditing.depth import depths
from stillknows.auditing.evidence import CellKey, Table
from stillknows.auditing.fact_test import fact_test, need_control
from stillknows.auditing.findings import out_of_reach_words
from stillknows.auditing.forecast import Forecast
from stillknows.auditing.general import general
from stillknows.auditing.loader import Loader
from stillknows.auditing.membership import Membership, apart, memberships, observed_references
from stillknows.auditing.plan import AuditConfig, LeftOut, plan
from stillknows.auditing.prepared import Audited, Prepared
from stillknows.auditing.request import described
from stillknows.auditing.served import require_affordable
from stillknows.auditing.updates import changes, updates
from stillknows.auditing.verdict import judge, out_of_reach
from stillknows.depth.outcome import Depth
from stillknows.gate.candidates import Placebos
from stillknows.gate.placebo import PlaceboTest
from stillknows.ledger import Ledger
from stillknows.model import run_record
from stillknows.progress import warn
from stillknows.registry import Bound
from stillknows.store import locked
from stillknows.types import CONTROL, ORIGINAL, UNDEFENDED, Cell, Finding, Observations, Role, Verdict
from stillknows.variants.variant import OF_MODELS, Variant


@dataclass(frozen=True)
class Audit:
    """The outcome: what was seen, the numbers made of it, the verdicts."""

    request: AuditConfig
    sources: Mapping[str, Audited]
    fingerprints: Mapping[str, str]
    records: Mapping[str, dict[str, Any] | None]
    versions: Mapping[str, str]
    observations: Mapping[CellKey, Observations]
    table: Table
    cells: tuple[Cell, ...]
    verdicts: tuple[Verdict, ...]
    out_of_reach: tuple[Finding, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    defences: Mapping[str, str] = field(default_factory=dict)
    placebos: Placebos | None = None
    facts: Mapping[str, PlaceboTest] = field(default_factory=dict)  # by model
    depth: Mapping[str, Depth] = field(default_factory=dict)  # by model; empty where it was not asked for
    attacks: Mapping[str, Mapping[str, AttackRecord]] = field(default_factory=dict)  # by model and variant
    membership: Mapping[str, Membership] = field(default_factory=dict)  # by model, where reference models are named


def audit(request: AuditConfig, out: Path) -> Audit:
    """Measure everything that `out` does not hold yet and judge. Raises UserError for bad input, before loading, and
    when another run works in `out`."""
    with locked(out):
        return _audit(request, out)


def _audit(request: AuditConfig, out: Path) -> Audit:
    everyone, reader, variants, left_out, metrics, figures, suite, placebos = plan(request, out)
    prepared, references = apart(everyone, request.references)
    obstacles = out_of_reach(request.benchmark, variants, len(request.controls), request.policy, placebos)
    if obstacles:
        warn(out_of_reach_words(obstacles))
    run_records = {model.label: None if model.served else run_record.read(model.ref.path) for model in prepared}
    versions = run_record.versions() | ({} if suite is None else {"lm-eval": suite.version})
    deployments = {name: variant for name, variant in variants.items() if variant.role == "deployment"}
    formats = {name: variant for name, variant in deployments.items() if variant.is_plain}
    keys, ledger = Keys(), Ledger.open(out)
    ledger.ask(described(request))
    load, measured = Loader(reader, [variant.chain for variant in variants.values()]), []
    todo = {model.label: missing(model, variants, keys, ledger) for model in prepared}
    require_affordable(prepared, variants, todo)
    forecast = Forecast.of(prepared, variants, todo)
    for model in prepared:
        if model.label != ORIGINAL and model.served is None:
            measured += [*changes(prepared[0], model, ledger), *updates(load, prepared[0], model, formats, ledger)]
        observe_missing(load, model, variants, keys, ledger, todo[model.label], forecast)
        if suite is not None:
            measured += general(load, model, formats, suite, request, ledger)
    deep = depths(load, prepared, request.benchmark, ledger) if request.depth else {}
    observations = {place: seen for p in prepared for place, seen in collected(p, variants, keys, ledger).items()}
    table, failing = _tabulated(observations, metrics, variants, request, placebos)
    beside = observed_references(load, references, variants, table.forget_splits, keys, ledger)
    labels = [model.label for model in prepared]
    cells = [cell for label in labels for cell in make_cells(table, label, variants, metrics)]
    cells += [cell for label in labels for cell in aggregate_cells(observations, label, deployments, figures)]
    attacks = [name for name, variant in variants.items() if variant.role == "attack"]
    tests = {
        label: placebos and fact_test(observations, label, table.forget_splits, placebos, table.controls, attacks)
        for label in labels
    }
    facts = {label: test for label, test in tests.items() if test}
    dropped = [Finding("control_failed", "note", model=label, detail=why) for label, why in failing.items()]
    shown = {label: depth.shows for label, depth in deep.items()} if CONTROL not in failing else {}  # their zero
    verdicts = tuple(
        _judged(table, p, prepared[0], variants, request, facts.get(p.label), dropped, shown.get(p.label))
        for p in prepared
    )
    return Audit(
        request,
        {p.label: p.source for p in prepared},
        {p.label: p.fingerprint for p in prepared},
        run_records,
        versions,
        observations,
        table,
        (*cells, *measured),
        verdicts,
        obstacles,
        left_out,
        {p.label: p.defence.bound.spec for p in prepared if p.defence},
        placebos,
        facts,
        deep,
        {p.label: _attacks(p, variants, keys, ledger) for p in prepared},
        memberships(observations, beside, table.forget_splits[0], table.controls),
    )


def _attacks(model: Prepared, variants: Mapping[str, Variant], keys: Keys, ledger: Ledger) -> dict[str, AttackRecord]:
    """Return what each attack on a model took and found."""
    attacks = {name: variant for name, variant in variants.items() if variant.role == "attack"}
    records = {name: recorded(model, name, variant, keys, ledger) for name, variant in attacks.items()}
    return {name: record for name, record in records.items() if record}


def _tabulated(
    observations: Mapping[CellKey, Observations],
    metrics: Mapping[str, Bound],
    variants: Mapping[str, Variant],
    request: AuditConfig,
    placebos: Placebos | None,
) -> tuple[Table, dict[str, str]]:
    """Return the scores of all models, with the controls that are ones, and why the others are none."""
    gates = {g for v in variants.values() for g in v.gates(request.policy.gates)} | {*request.policy.gates}
    roles: dict[str, Role] = {s.name: s.role for s in request.benchmark.splits}
    unlike, guessable = (need_control(placebos), placebos.guessable) if placebos else ({}, ())
    table = evidence.tabulate(observations, metrics, roles, gates=gates, need_control=unlike, guessable=guessable)
    failing = failing_controls(table, observations, placebos, request.policy)
    for control, why in failing.items():
        warn(f"{control} is left out, since it is no never-taught control: {why}")
    return replace(table, controls=tuple(label for label in table.controls if label not in failing)), failing


def _attacked(variant: Variant) -> AttackOn:
    """Return what the attacks in a variant change: the model, or only how it is asked and answers."""
    attacks = (link.plugin for link in variant.links if link.plugin.role == "attack")
    return "model" if any(attack.level in OF_MODELS for attack in attacks) else "question"


def _judged(
    table: Table,
    model: Prepared,
    original: Prepared,
    variants: Mapping[str, Variant],
    request: AuditConfig,
    facts: PlaceboTest | None,
    dropped: Sequence[Finding],
    hidden: bool | None,
) -> Verdict:
    """Return the verdict, which says first if something but the weights was changed."""
    attacks = {name: v.gates(request.policy.gates) for name, v in variants.items() if v.role == "attack"}
    attacked: dict[str, AttackOn] = {name: _attacked(v) for name, v in variants.items() if v.role == "attack"}
    verdict = judge(
        table, model.label, list(variants), request.policy, attacks, facts, attacked=attacked, hidden=hidden
    )
    notes = (Finding("served_differently", "note", detail=note) for note in model.notes)
    verdict = replace(verdict, findings=(*verdict.findings, *dropped, *notes))
    if model.defence is None:
        return verdict
    whose = "the original's" if model.fingerprint == original.fingerprint else f"those of {model.ref.name}"
    plain = f"defence by {model.defence.bound.spec}: the weights are {whose}, measured by themselves as {UNDEFENDED}"
    return replace(verdict, findings=(Finding("weights_unchanged", "note", detail=plain), *verdict.findings))
