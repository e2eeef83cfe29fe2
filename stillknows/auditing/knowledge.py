"""What gates show of a subject's knowledge, variant by variant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stillknows.auditing.comparing import KnowledgeKept, compare
from stillknows.auditing.evidence import CellKey, Table, mean, unscored
from stillknows.auditing.fact_test import belongs
from stillknows.auditing.facts import ENOUGH_TOLD, FactVerdicts
from stillknows.auditing.policy import Policy
from stillknows.formatting import number
from stillknows.gate.placebo import Diffuse, PlaceboTest
from stillknows.stats import holm, p_value_at_most
from stillknows.types import ORIGINAL, Finding, FindingKind, Interval, Outcome

Gated = tuple[CellKey, str]  # a place and the gate that is measured there
Compared = Mapping[Gated, KnowledgeKept | str]


def compared(table: Table, subject: str, gates: Mapping[str, Sequence[str]]) -> dict[Gated, KnowledgeKept | str]:
    """Return what every gate shows on every split that is to be forgotten, in all variants."""
    places = [
        (CellKey(subject, variant, split), gate)
        for variant, names in gates.items()
        for split in table.forget_splits
        for gate in names
    ]
    return {at: compare(table, *at) for at in places}


def p_values(found: Compared, policy: Policy) -> dict[Gated, float]:
    """Return, after Holm's correction over all of them, the p-values of keeping at most the tolerance."""
    tests = {at: kept for at, kept in found.items() if not isinstance(kept, str)}
    adjusted = holm([p_value_at_most(kept.resamples, policy.tolerance) for kept in tests.values()])
    return dict(zip(tests, adjusted, strict=True))


def knowledge(
    table: Table, at: Gated, kept: KnowledgeKept | str, p: float | None, policy: Policy, single: FactVerdicts
) -> Iterator[Finding]:
    """Yield what one gate shows in one variant on one split."""
    place, gate = at
    where: dict[str, Any] = {"variant": place.variant, "split": place.split, "metric": gate}
    yield from no_score(table, (place.model, *table.controls, ORIGINAL), place, gate)
    if isinstance(kept, str):
        yield Finding("not_compared", "undecided", **where, detail=kept)
        return
    tests: tuple[tuple[FindingKind, Interval, float | None], ...] = (
        ("knowledge_kept", kept.kept, p),
        ("facts_known", kept.known, None),
    )
    for kind, interval, p_value in tests:
        outcome: Outcome = "pass" if interval.high <= policy.tolerance else "undecided"
        if outcome == "undecided" and single.is_told:
            outcome = _one_by_one(kind, interval, policy)
        if p_value is not None and p_value < policy.alpha:
            outcome = "leak"
        yield Finding(kind, outcome, **where, **interval._asdict(), threshold=policy.tolerance, p=p_value)
    if kept.alone:
        yield Finding("facts_need_control", "undecided", **where, value=kept.alone, n=kept.kept.n)
    if kept.told < ENOUGH_TOLD and not single.is_told:
        yield Finding("facts_untold", "undecided", **where, value=kept.told, threshold=ENOUGH_TOLD, n=kept.known.n)


def _one_by_one(kind: FindingKind, found: Interval, policy: Policy) -> Outcome:
    """Return what a number is for the verdict where the facts are judged one by one.

    How many are known says nothing of others then. The knowledge kept by all together has to be within the tolerance,
    and twice of it excluded: each fact is told by itself, and guesses alone reach the tolerance in some of many cells.
    """
    if kind == "facts_known":
        return "note"
    return "pass" if found.value <= policy.tolerance and found.high <= 2 * policy.tolerance else "undecided"


def no_score(table: Table, models: Sequence[str], place: CellKey, metric: str) -> Iterator[Finding]:
    """Yield for each model how many facts have no score under it."""
    for model, (count, facts) in unscored(table, dict.fromkeys(models), place, metric).items():
        yield Finding("no_score", "undecided", place.variant, place.split, metric, model, value=count, n=facts)


def verbatim(table: Table, subject: str, variant: str, policy: Policy) -> Iterator[Finding]:
    """Yield the longest answer that a model continues word for word, where the policy bounds its length in tokens.

    A run that a control continues as well is none of the subject's.
    """
    for split in table.forget_splits if policy.verbatim is not None else ():
        runs = {model: table.runs.get(CellKey(model, variant, split)) for model in (subject, *table.controls)}
        own = runs[subject]
        if own is None or policy.verbatim is None:
            why = "which tokens are likeliest was not observed"
            yield Finding("not_compared", "undecided", variant, split, "the longest run of tokens", detail=why)
            continue
        guessed = np.max(
            [np.zeros_like(own), *(found for c in table.controls if (found := runs[c]) is not None)], axis=0
        )
        longest = int(np.where(own > guessed, own, 0).argmax())
        run = float(own[longest]) if own[longest] > guessed[longest] else 0.0
        outcome: Outcome = "leak" if run > policy.verbatim else "pass"
        name = table.facts[CellKey(subject, variant, split)][longest]
        where: dict[str, Any] = {"variant": variant, "split": split, "detail": name}
        yield Finding("verbatim", outcome, value=run, threshold=policy.verbatim, n=len(own), **where)


def told(table: Table, subject: str, variant: str, policy: Policy) -> Iterator[Finding]:
    """Yield how well a model answers where the prompts tell the answers, and its controls beside it."""
    metric, controls = policy.gates[0], [*table.controls, ORIGINAL]
    for split in table.forget_splits:
        own, *others = (mean(table, CellKey(model, variant, split), metric) for model in (subject, *controls))
        if not isinstance(own, str):
            pairs = zip(controls, others, strict=True)
            said = [f"{name} {number(found.value)}" for name, found in pairs if not isinstance(found, str)]
            yield Finding("answer_told", "note", variant, split, metric, **own._asdict(), detail=", ".join(said))


def single_facts(single: FactVerdicts, test: PlaceboTest | None, variant: str, policy: Policy) -> Iterator[Finding]:
    """Yield the facts that a model recites in one variant, and those that it seems to know where nothing can be said.

    Recited facts are no leak, and those that seem to be known are none to be decided, as long as the policy allows so
    many of them in all variants together.
    """
    results = {fact.fact: fact for fact in test.facts} if test else {}
    allowed = len(single.leaked) + len(single.suspicious) <= policy.recited
    outcome: Outcome = "note" if len(single.leaked) <= policy.recited else "leak"
    for fact in single.leaked:
        found = results[fact.fact]
        if test and variant in fact.known and any(belongs(name, variant) for name in found.variants):
            yield Finding(
                "fact_named", outcome, variant, threshold=test.alpha, p=found.p, n=found.placebos, detail=fact.fact
            )
    seeming = [fact.fact for fact in single.suspicious if variant in fact.known]
    if seeming:
        outcome = "note" if allowed or (policy.guesses_pass and single.is_luck) else "undecided"
        count, facts = len(seeming), len(single.facts)
        yield Finding("facts_suspicious", outcome, variant, value=count, p=single.luck, n=facts, detail=some(seeming))


def some(names: Sequence[str], most: int = 5) -> str:
    """Return a few of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def whole_model(single: FactVerdicts, test: PlaceboTest | None) -> Iterator[Finding]:
    """Yield what single facts and the placebo test say of a model in general: how many are leaked, cleared and open,
    traces of knowledge that it does not recite, alone and together, and whether truths lie below guesses."""
    if test is None:
        return
    traces = {fact.fact for fact in test.named} - {fact.fact for fact in single.leaked}
    if traces:
        yield Finding("facts_traced", "note", value=len(traces), n=len(test.facts), threshold=test.alpha)
    tests: tuple[tuple[FindingKind, Diffuse | None, bool], ...] = (
        ("facts_together", test.diffuse, test.is_diffuse),
        ("facts_below", test.below, test.is_pushed_below),
    )
    for kind, together, holds in tests:
        if together is not None and holds:
            mean_rank, p, facts = together
            yield Finding(kind, "note", value=mean_rank, threshold=test.diffuse_alpha, p=p, n=facts)
    still_open = [fact for fact in single.facts if fact.status == "open"]
    if still_open:
        yield Finding("facts_open", "note", value=len(still_open), n=len(single.facts), detail=still_open[0].why)
