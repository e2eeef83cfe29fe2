"""One verdict per model from the evidence, by bounds and never by point values.

A missing score, an untestable fact, a control or a split that proves nothing is never a pass. Facts are judged one by
one; where these can be told, how many there are does not matter. Otherwise they are taken for a sample, which has to be
large enough. To pass, all cells must pass, so no correction is due there (an intersection–union test, Berger 1982).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from stillknows.auditing.claims import AttackOn, Evidence, claims
from stillknows.auditing.evidence import Table
from stillknows.auditing.facts import ENOUGH_TOLD, FactVerdicts, fact_verdicts
from stillknows.auditing.findings import KNOWLEDGE, variant_verdict
from stillknows.auditing.knowledge import compared, knowledge, p_values, single_facts, told, verbatim, whole_model
from stillknows.auditing.policy import Policy, least_facts, unmet
from stillknows.auditing.relative import ENOUGH
from stillknows.auditing.retained import damage
from stillknows.formatting import percent
from stillknows.gate.candidates import NEED_CONTROL, Placebos
from stillknows.gate.placebo import PlaceboTest
from stillknows.judgements import Claim
from stillknows.types import FULL, Benchmark, Finding, FindingKind, Split, Verdict, VerdictName

EXIT_CODES: dict[VerdictName, int] = {"FORGOTTEN": 0, "STILL KNOWS": 3, "HIDDEN": 3, "DAMAGED": 4, "UNDECIDED": 5}


def out_of_reach(
    benchmark: Benchmark, variants: Collection[str], controls: int, policy: Policy, answers: Placebos | None = None
) -> tuple[Finding, ...]:
    """Return why no model can be found FORGOTTEN, whatever is observed; nothing where one can.

    Args:
        controls: how many never-taught ones there are.
        answers: the placebos. They stand in for a control where they are alike to a model that was never taught, and
            where facts have some, few facts are enough.
    """
    roles, least = {split.role for split in benchmark.splits}, least_facts(policy.tolerance)
    has_control = controls > 0
    forget = [split for split in benchmark.splits if split.role == "forget"]
    shares = {split.name: with_placebos(split, answers, has_control) for split in forget}
    found = []
    if not has_control and min(shares.values(), default=0) < 1:
        parts = ", ".join(f"{percent(share)} of the facts of {name}" for name, share in shares.items() if share < 1)
        detail = f"placebos stand in for one with {parts}" if any(shares.values()) else None
        found.append(Finding("no_control", "undecided", detail=detail))
    missing: tuple[tuple[FindingKind, bool], ...] = (
        ("full_not_measured", FULL not in variants),
        ("no_retain_split", "retain" not in roles),
    )
    found += [Finding(kind, "undecided") for kind, holds in missing if holds]
    found += [Finding("policy_unmet", "undecided", detail=what) for what in unmet(policy, variants, controls)]
    for split in forget:
        facts = len({example.fact for example in split.examples})
        if facts < least and shares[split.name] < ENOUGH_TOLD:
            where = {"split": split.name, "value": least, "threshold": policy.tolerance, "n": facts}
            found.append(Finding("too_few_facts", "undecided", **where))
    return tuple(found)


def with_placebos(split: Split, answers: Placebos | None, has_control: bool) -> float:
    """Return the share of a split's facts that have enough placebos, alike to one that was never taught or with a
    control."""
    enough: dict[str, bool] = {}
    for example in split.examples:
        own = answers.of(example) if answers else ()
        alike = has_control or (answers and answers.sources.get((example.fact, example.answer)) not in NEED_CONTROL)
        enough[example.fact] = enough.get(example.fact, True) and len(own) >= ENOUGH and bool(alike)
    return sum(enough.values()) / len(enough) if enough else 0.0


def judge(
    table: Table,
    subject: str,
    variants: Sequence[str],
    policy: Policy,
    attacks: Mapping[str, tuple[str, ...]] | None = None,
    facts: PlaceboTest | None = None,
    *,
    attacked: Mapping[str, AttackOn] = MappingProxyType({}),
    hidden: bool | None = None,
) -> Verdict:
    """Return the verdict on one subject over all variants.

    Args:
        attacks: those of the variants that are attacks, with the metrics that each is judged by in the place of the
            policy's gates. A model need not stay useful under attack. One that no metric judges tells the answers in
            its prompts: what is answered then is noted and decides nothing.
        facts: the placebo test of the subject.
        attacked: what each attack changes, the questions or the model.
        hidden: whether hidden states show knowledge; None where nobody looked, or they do not tell.
    """
    attacks = attacks or {}
    gates = {variant: attacks.get(variant, policy.gates) for variant in variants}
    strict = {"half": policy.half_known, "guesses_pass": policy.guesses_pass}
    single = fact_verdicts(table, subject, gates, policy.gates, facts, **strict)
    findings = _findings(table, subject, gates, policy, attacks, facts, single)
    names: dict[str, VerdictName] = {variant: variant_verdict(found) for variant, found in findings.items()}
    shown = [variant for variant, found in findings.items() if _shows(found)]
    first = [] if FULL in variants else [Finding("full_not_measured", "undecided")]
    first += [
        Finding("policy_unmet", "undecided", detail=what)
        for what in unmet(policy, [v for v in variants if v in shown or not gates[v]], len(table.controls))
    ]
    everything = [*first, *(finding for found in findings.values() for finding in found), *whole_model(single, facts)]
    on: dict[str, AttackOn] = {variant: attacked.get(variant, "question") for variant in shown if variant in attacks}
    claimed = claims(Evidence(everything, shown, on, table.forget_splits, single, facts, hidden))
    everything[len(first) : len(first)] = _required(policy, claimed)
    name = _overall({variant: names[variant] for variant in shown})
    if name == "FORGOTTEN" and any(f.outcome == "undecided" for f in everything if f.variant is None):
        name = "UNDECIDED"
    return Verdict(subject, name, tuple(everything), names, claimed, single.facts)


def _findings(
    table: Table,
    subject: str,
    gates: Mapping[str, tuple[str, ...]],
    policy: Policy,
    attacks: Collection[str],
    facts: PlaceboTest | None,
    single: FactVerdicts,
) -> dict[str, list[Finding]]:
    """Return what was found in each variant."""
    found = compared(table, subject, gates)
    adjusted = p_values({at: kept for at, kept in found.items() if at[0].variant not in attacks}, policy)
    adjusted |= p_values({at: kept for at, kept in found.items() if at[0].variant in attacks}, policy)
    return {
        variant: [
            finding
            for at, kept in found.items()
            if at[0].variant == variant
            for finding in knowledge(table, at, kept, adjusted.get(at), policy, single)
        ]
        + list(single_facts(single, facts, variant, policy))
        + list(verbatim(table, subject, variant, policy) if gates[variant] else [])
        + list(damage(table, subject, variant, policy) if variant not in attacks else [])
        + list(told(table, subject, variant, policy) if not gates[variant] else [])
        for variant in gates
    }


def _required(policy: Policy, claimed: Sequence[Claim]) -> list[Finding]:
    """Return that the claim which a policy asks for is not shown; nothing where it is."""
    lacking = [claim for claim in claimed if claim.name == policy.claim and claim.verdict != "PASS"]
    what = "the claim {} to be shown, which is {}"
    return [Finding("policy_unmet", "undecided", detail=what.format(c.name, c.verdict)) for c in lacking]


def _shows(findings: Collection[Finding]) -> bool:
    """Tell whether a variant counts: not where nothing can be compared though every fact has its scores, and none seems
    to be known."""
    kinds: tuple[FindingKind, ...] = (*KNOWLEDGE, "no_score", "facts_suspicious")
    return any(finding.kind in kinds or finding.outcome == "leak" for finding in findings)


def _overall(variants: Mapping[str, VerdictName]) -> VerdictName:
    """Combine the verdicts on the variants that count."""
    measured, full = set(variants.values()), variants.get(FULL)
    if "STILL KNOWS" in measured:
        return "STILL KNOWS" if full in ("STILL KNOWS", None) else "HIDDEN"
    if "DAMAGED" in measured:
        return "DAMAGED"
    return "FORGOTTEN" if full is not None and measured == {"FORGOTTEN"} else "UNDECIDED"
