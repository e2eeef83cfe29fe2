"""One verdict per model from the evidence, by bounds and never by point values.

A variant LEAKS when some gate metric shows, after Holm's correction over all variants and gates, that more than
`tolerance` of the knowledge is kept. It is CLEAN when every gate's upper bounds (knowledge kept, share of facts known)
are at most `tolerance`: to pass, all cells must pass, so no correction is due there (an intersection–union test,
Berger 1982). Anything between is undecided; few facts cannot prove forgetting however low they score, and neither can a
gate that was not measured, or a fact that a model gives no score for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_type_hints

from stillknows import defaults
from stillknows.arguments import require_type
from stillknows.auditing.evidence import CellKey, Comparison, Table, compare, unscored, utility
from stillknows.errors import UserError
from stillknows.formatting import percent
from stillknows.stats import LEVEL, holm, p_value_at_most
from stillknows.types import CONTROL, FULL, ORIGINAL, Benchmark, Interval, Verdict, VerdictName

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
                raise UserError(f"--{name} {value} is out of range", "it must be above 0 and below 1")
        if not 0 <= self.utility_floor <= 1:
            raise UserError(f"--utility-floor {self.utility_floor} is out of range", "it must be between 0 and 1")


def least_facts(tolerance: float) -> int:
    """Return how many facts must be asked for until none that is known excludes a share of `tolerance`: 29 for 10 %."""
    return math.ceil(math.log(1 - LEVEL) / math.log(1 - tolerance))


def out_of_reach(benchmark: Benchmark, variants: Collection[str], has_control: bool, policy: Policy) -> str:
    """Say why no model can be found FORGOTTEN, whatever is observed, and what would help; "" where one can."""
    roles, least = {split.role for split in benchmark.splits}, least_facts(policy.tolerance)
    found = [] if has_control else ["there is no never-taught control (--control)"]
    if FULL not in variants:
        found.append("full precision is not measured (--variants full,…)")
    if "retain" not in roles:
        found.append("there is no retain split, so that damage cannot be excluded")
    for split in benchmark.splits:
        facts = len({example.fact for example in split.examples})
        if split.role == "forget" and facts < least:
            found.append(
                f"{split.name} has {facts} of the {least} facts that it takes to exclude {percent(policy.tolerance)}"
            )
    return f"FORGOTTEN is out of reach here: {'; '.join(found)}" if found else ""


@dataclass
class _Evidence:
    """What one variant of a subject shows.

    missing: gates that could not be compared, and why. unscored: facts that some model has no score for, in words.
    """

    comparisons: dict[str, Comparison] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unscored: list[str] = field(default_factory=list)
    utility: dict[str, Interval] = field(default_factory=dict)

    @property
    def shows(self) -> bool:
        """Whether the variant counts: not where nothing can be compared though every fact has its scores."""
        return bool(self.comparisons or self.unscored)


class _Finding(NamedTuple):
    name: VerdictName
    reason: str


def judge(
    table: Table,
    subject: str,
    variants: Sequence[str],
    policy: Policy,
    attacks: Mapping[str, tuple[str, ...]] | None = None,
) -> Verdict:
    """Return the verdict on one subject over all variants.

    Args:
        attacks: those of the variants that are attacks, with the metrics that each is judged by in the place of the
            policy's gates. A model need not stay useful under attack.
    """
    attacks = attacks or {}
    evidence = {
        variant: _collect(table, subject, variant, policy, attacks.get(variant, policy.gates)) for variant in variants
    }
    leaks = _leaks({v: seen for v, seen in evidence.items() if v not in attacks}, policy)
    leaks |= _leaks({v: seen for v, seen in evidence.items() if v in attacks}, policy)
    findings = {
        variant: _variant(evidence[variant], leaks[variant], policy, judges_utility=variant not in attacks)
        for variant in variants
    }
    name = _overall({variant: finding.name for variant, finding in findings.items()}, evidence)
    reasons = [f"{v}: {'; '.join([found.reason, *evidence[v].unscored])}" for v, found in findings.items()]
    if FULL not in variants:
        reasons.insert(0, "the variant 'full' was not measured")
    return Verdict(subject, name, tuple(reasons), {v: f.name for v, f in findings.items()})


def _collect(table: Table, subject: str, variant: str, policy: Policy, gates: Sequence[str]) -> _Evidence:
    found = _Evidence()
    for split, role in table.roles.items():
        place = CellKey(subject, variant, split)
        if role == "retain" and (place, policy.utility) in table.scores:
            found.unscored += unscored(table, list(dict.fromkeys((subject, ORIGINAL))), place, policy.utility)
            kept = utility(table, place, policy.utility)
            if not isinstance(kept, str):
                found.utility[split] = kept
        if role != "forget":
            continue
        for gate in gates:
            if table.has_control:
                found.unscored += unscored(table, list(dict.fromkeys((subject, CONTROL, ORIGINAL))), place, gate)
            result = compare(table, place, gate)
            if isinstance(result, str):
                found.missing.append(f"{gate} on {split}: {result}")
            else:
                found.comparisons[f"{gate} on {split}"] = result
    return found


def _leaks(evidence: dict[str, _Evidence], policy: Policy) -> dict[str, list[str]]:
    """Return, per variant, the gates that are shown to keep more than the tolerance."""
    tests = [(variant, gate, c) for variant, seen in evidence.items() for gate, c in seen.comparisons.items()]
    adjusted = holm([p_value_at_most(c.resamples, policy.tolerance) for _, _, c in tests])
    leaks: dict[str, list[str]] = {variant: [] for variant in evidence}
    for (variant, gate, _), p in zip(tests, adjusted, strict=True):
        if p < policy.alpha:
            leaks[variant].append(gate)
    return leaks


def _variant(seen: _Evidence, leaks: list[str], policy: Policy, *, judges_utility: bool = True) -> _Finding:
    if leaks:
        return _Finding("STILL KNOWS", _words(seen.comparisons, leaks))
    not_measured = [f"not measured: {reason}" for reason in seen.missing]
    if not seen.comparisons:
        return _Finding("UNDECIDED", "; ".join(not_measured))
    damage = _damage(seen.utility, policy) if judges_utility else None
    everything = _words(seen.comparisons, list(seen.comparisons))
    if damage is not None and damage.name == "DAMAGED":
        return damage
    if not_measured or seen.unscored:
        return _Finding("UNDECIDED", "; ".join([everything, *not_measured]))
    if damage is not None:
        return damage
    unsure = [gate for gate, c in seen.comparisons.items() if max(c.kept.high, c.known.high) > policy.tolerance]
    if unsure:
        return _Finding("UNDECIDED", f"{_words(seen.comparisons, unsure)}; {policy.tolerance:.0%} is not excluded")
    return _Finding("FORGOTTEN", everything)


def _damage(utility: dict[str, Interval], policy: Policy) -> _Finding | None:
    if not utility:
        return _Finding("UNDECIDED", "utility was not measured: no retain split on which the original scores")
    for split, kept in utility.items():
        text = f"{split} keeps {kept.value:.2f} of the original's score (bounds {kept.low:.2f} to {kept.high:.2f})"
        if kept.high < policy.utility_floor:
            return _Finding("DAMAGED", text)
        if kept.low < policy.utility_floor:
            return _Finding("UNDECIDED", f"{text}; damage below {policy.utility_floor:g} is not excluded")
    return None


def _overall(variants: dict[str, VerdictName], evidence: dict[str, _Evidence]) -> VerdictName:
    """Combine the variants; those that show nothing do not count, except full precision."""
    measured = {name for variant, name in variants.items() if evidence[variant].shows}
    full = variants[FULL] if FULL in variants and evidence[FULL].shows else None
    if "STILL KNOWS" in measured:
        return "STILL KNOWS" if full in ("STILL KNOWS", None) else "HIDDEN"
    if "DAMAGED" in measured:
        return "DAMAGED"
    return "FORGOTTEN" if full is not None and measured == {"FORGOTTEN"} else "UNDECIDED"


def _words(comparisons: dict[str, Comparison], gates: list[str]) -> str:
    """Say what the named gates measured."""
    return "; ".join(
        f"{gate}: keeps {c.kept.value:.2f} of the knowledge (bounds {c.kept.low:.2f} to {_upper(c.kept)}), "
        f"{c.known.value:.0%} of {c.known.n} facts known (at most {c.known.high:.1%})"
        for gate, c in ((gate, comparisons[gate]) for gate in gates)
    )


def _upper(bounds: Interval) -> str:
    return "∞" if math.isinf(bounds.high) else f"{bounds.high:.2f}"
