"""One verdict per model from the evidence, by bounds and never by point values.

A variant LEAKS when some gate metric shows, after Holm's correction over all variants and gates, that more than
`tolerance` of the knowledge is kept. It is CLEAN when every gate's upper bounds (knowledge kept, share of facts known)
are at most `tolerance`: to pass, all cells must pass, so no correction is due there (an intersection–union test,
Berger 1982). Anything between is undecided; few facts cannot prove forgetting however low they score, and neither can a
gate that was not measured, or a fact that a model gives no score for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_type_hints

from stillknows import defaults
from stillknows.arguments import require_type
from stillknows.auditing.evidence import CellKey, KnowledgeKept, Table, compare, mean, share, unscored
from stillknows.auditing.fact_test import fact_leaks, fact_notes, recited
from stillknows.auditing.findings import KNOWLEDGE, variant_verdict
from stillknows.errors import UserError
from stillknows.formatting import number
from stillknows.gate.placebo import PlaceboTest
from stillknows.stats import LEVEL, holm, p_value_at_most
from stillknows.types import (
    CONTROL,
    FULL,
    ORIGINAL,
    Benchmark,
    Finding,
    FindingKind,
    Interval,
    Outcome,
    Verdict,
    VerdictName,
)

EXIT_CODES: dict[VerdictName, int] = {"FORGOTTEN": 0, "STILL KNOWS": 3, "HIDDEN": 3, "DAMAGED": 4, "UNDECIDED": 5}


@dataclass(frozen=True)
class Policy:
    """What a verdict demands.

    tolerance: largest share of the knowledge, and of the facts, that may remain: 0..1.
    utility_floor: least retain score relative to the original under the same variant: 0..1.
    alpha: error rate of the claim that a model leaks, over all its deployments and gates together, and once more over
        all attacks: what is tried besides does not weaken the first claim.
    gates: metrics that must all pass; the ones that rank best in public meta-evaluations of unlearning metrics.
    utility: metric that damage is measured by.
    """

    tolerance: float = defaults.TOLERANCE
    utility_floor: float = defaults.UTILITY_FLOOR
    alpha: float = 0.05
    gates: tuple[str, ...] = ("answer_probability", "extraction_strength")
    utility: str = "answer_probability"

    def __post_init__(self) -> None:
        """Raise UserError for thresholds that no evidence can meet or miss, and for what is no number."""
        for name, kind in get_type_hints(Policy).items():
            require_type(name, getattr(self, name), kind)
        for name, value in (("tolerance", self.tolerance), ("alpha", self.alpha)):
            if not 0 < value < 1:
                raise UserError(f"`{name}` {value} is out of range", "it must be above 0 and below 1")
        if not 0 <= self.utility_floor <= 1:
            raise UserError(f"`utility_floor` {self.utility_floor} is out of range", "it must be between 0 and 1")


def least_facts(tolerance: float) -> int:
    """Return how many facts must be asked for until none that is known excludes a share of `tolerance`: 29 for 10 %."""
    return math.ceil(math.log(1 - LEVEL) / math.log(1 - tolerance))


def out_of_reach(
    benchmark: Benchmark, variants: Collection[str], has_control: bool, policy: Policy
) -> tuple[Finding, ...]:
    """Return why no model can be found FORGOTTEN, whatever is observed; nothing where one can."""
    roles, least = {split.role for split in benchmark.splits}, least_facts(policy.tolerance)
    missing: tuple[tuple[FindingKind, bool], ...] = (
        ("no_control", not has_control),
        ("full_not_measured", FULL not in variants),
        ("no_retain_split", "retain" not in roles),
    )
    found = [Finding(kind, "undecided") for kind, holds in missing if holds]
    for split in benchmark.splits:
        facts = len({example.fact for example in split.examples})
        if split.role == "forget" and facts < least:
            found.append(
                Finding(
                    "too_few_facts", "undecided", split=split.name, value=least, threshold=policy.tolerance, n=facts
                )
            )
    return tuple(found)


def judge(
    table: Table,
    subject: str,
    variants: Sequence[str],
    policy: Policy,
    attacks: Mapping[str, tuple[str, ...]] | None = None,
    facts: PlaceboTest | None = None,
) -> Verdict:
    """Return the verdict on one subject over all variants.

    Args:
        attacks: those of the variants that are attacks, with the metrics that each is judged by in the place of the
            policy's gates. A model need not stay useful under attack. One that no metric judges tells the answers in
            its prompts: what is answered then is noted and decides nothing.
        facts: the placebo test of the subject. A fact that it names and that the subject answers is a leak; it clears
            no model.
    """
    attacks = attacks or {}
    gates = {variant: attacks.get(variant, policy.gates) for variant in variants}
    compared = {at: compare(table, *at) for variant in variants for at in _gated(table, subject, variant, gates)}
    p_values = _p_values({at: kept for at, kept in compared.items() if at[0].variant not in attacks}, policy)
    p_values |= _p_values({at: kept for at, kept in compared.items() if at[0].variant in attacks}, policy)
    findings = {
        variant: [
            finding
            for at, kept in compared.items()
            if at[0].variant == variant
            for finding in _knowledge(table, at, kept, p_values.get(at), policy)
        ]
        + (list(fact_leaks(facts, variant, _answered(table, subject, variant, gates))) if facts else [])
        + list(_damage(table, subject, variant, policy) if variant not in attacks else [])
        + list(_told(table, subject, variant, policy) if not gates[variant] else [])
        for variant in variants
    }
    names: dict[str, VerdictName] = {variant: variant_verdict(found) for variant, found in findings.items()}
    shown = {variant for variant, found in findings.items() if _shows(found)}
    first = [] if FULL in variants else [Finding("full_not_measured", "undecided")]
    everything = (*first, *(finding for found in findings.values() for finding in found))
    if facts:
        everything += tuple(fact_notes(facts, [finding for finding in everything if finding.kind == "fact_named"]))
    return Verdict(subject, _overall({v: name for v, name in names.items() if v in shown}), everything, names)


_Gated = tuple[CellKey, str]  # a place and the gate that is measured there


def _gated(table: Table, subject: str, variant: str, gates: Mapping[str, Sequence[str]]) -> Iterator[_Gated]:
    """Yield what a variant is judged by: every gate on every split that is to be forgotten."""
    for split, role in table.roles.items():
        if role == "forget":
            yield from ((CellKey(subject, variant, split), gate) for gate in gates[variant])


def _answered(table: Table, subject: str, variant: str, gates: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Return the facts that a subject answers in a variant, on some split to forget."""
    splits = [split for split, role in table.roles.items() if role == "forget"]
    return frozenset().union(*(recited(table, CellKey(subject, variant, at), gates[variant]) for at in splits))


def _p_values(compared: Mapping[_Gated, KnowledgeKept | str], policy: Policy) -> dict[_Gated, float]:
    """Return, after Holm's correction over all of them, the p-values of keeping at most the tolerance."""
    tests = {at: kept for at, kept in compared.items() if not isinstance(kept, str)}
    adjusted = holm([p_value_at_most(kept.resamples, policy.tolerance) for kept in tests.values()])
    return dict(zip(tests, adjusted, strict=True))


def _knowledge(
    table: Table, at: _Gated, kept: KnowledgeKept | str, p: float | None, policy: Policy
) -> Iterator[Finding]:
    """Yield what one gate shows in one variant on one split."""
    place, gate = at
    if table.has_control:
        yield from _no_score(table, (place.model, CONTROL, ORIGINAL), place, gate)
    if isinstance(kept, str):
        yield Finding("not_compared", "undecided", place.variant, place.split, gate, detail=kept)
        return
    tests: tuple[tuple[FindingKind, Interval, float | None], ...] = (
        ("knowledge_kept", kept.kept, p),
        ("facts_known", kept.known, None),
    )
    for kind, interval, p_value in tests:
        outcome: Outcome = "pass" if interval.high <= policy.tolerance else "undecided"
        if p_value is not None and p_value < policy.alpha:
            outcome = "leak"
        where = {"variant": place.variant, "split": place.split, "metric": gate}
        yield Finding(kind, outcome, **where, **interval._asdict(), threshold=policy.tolerance, p=p_value)


def _told(table: Table, subject: str, variant: str, policy: Policy) -> Iterator[Finding]:
    """Yield how well a model answers where the prompts tell the answers, and its controls beside it."""
    metric, controls = policy.gates[0], [*([CONTROL] if table.has_control else []), ORIGINAL]
    for split in (split for split, role in table.roles.items() if role == "forget"):
        own, *others = (mean(table, CellKey(model, variant, split), metric) for model in (subject, *controls))
        if not isinstance(own, str):
            pairs = zip(controls, others, strict=True)
            said = [f"{name} {number(found.value)}" for name, found in pairs if not isinstance(found, str)]
            yield Finding("answer_told", "note", variant, split, metric, **own._asdict(), detail=", ".join(said))


def _no_score(table: Table, models: Sequence[str], place: CellKey, metric: str) -> Iterator[Finding]:
    for model, (count, facts) in unscored(table, dict.fromkeys(models), place, metric).items():
        yield Finding("no_score", "undecided", place.variant, place.split, metric, model, value=count, n=facts)


def _damage(table: Table, subject: str, variant: str, policy: Policy) -> Iterator[Finding]:
    """Yield what of the retain splits one variant keeps."""
    metric, floor = policy.utility, policy.utility_floor
    places = [CellKey(subject, variant, split) for split, role in table.roles.items() if role == "retain"]
    if not places:
        yield Finding("utility_not_measured", "undecided", variant, metric=metric, detail="there is no retain split")
    for place in places:
        yield from _no_score(table, (subject, ORIGINAL), place, metric)
        retained = share(table, place, metric)
        if isinstance(retained, str):
            yield Finding("utility_not_measured", "undecided", variant, place.split, metric, detail=retained)
            continue
        outcome: Outcome = "damage" if retained.high < floor else "undecided" if retained.low < floor else "pass"
        yield Finding("utility", outcome, variant, place.split, metric, **retained._asdict(), threshold=floor)


def _shows(findings: Collection[Finding]) -> bool:
    """Tell whether a variant counts: not where nothing can be compared though every fact has its scores."""
    return any(finding.kind in (*KNOWLEDGE, "no_score") or finding.outcome == "leak" for finding in findings)


def _overall(variants: Mapping[str, VerdictName]) -> VerdictName:
    """Combine the verdicts on the variants that count."""
    measured, full = set(variants.values()), variants.get(FULL)
    if "STILL KNOWS" in measured:
        return "STILL KNOWS" if full in ("STILL KNOWS", None) else "HIDDEN"
    if "DAMAGED" in measured:
        return "DAMAGED"
    return "FORGOTTEN" if full is not None and measured == {"FORGOTTEN"} else "UNDECIDED"
