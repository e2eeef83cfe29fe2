"""Findings in words: the one place that says what a verdict rests on. See `types.Finding` for the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby

from stillknows.formatting import number, percent
from stillknows.types import Finding, FindingKind, Outcome, VerdictName

KNOWLEDGE: tuple[FindingKind, ...] = ("knowledge_kept", "facts_known")  # what a verdict on a variant needs
SAME_WEIGHTS = "the weights are the original's"  # of layers that a format rounds: there is no update to survive
DECIDES: Mapping[VerdictName, Outcome] = {
    "STILL KNOWS": "leak",
    "DAMAGED": "damage",
    "UNDECIDED": "undecided",
    "FORGOTTEN": "pass",
}


def variant_verdict(findings: Iterable[Finding]) -> VerdictName:
    """Return the verdict on one variant: FORGOTTEN only where something was compared and every finding passes."""
    found = list(findings)
    outcomes = {finding.outcome for finding in found}
    if "leak" in outcomes:
        return "STILL KNOWS"
    if not any(finding.kind in KNOWLEDGE for finding in found):
        return "UNDECIDED"
    if "damage" in outcomes:
        return "DAMAGED"
    return "UNDECIDED" if "undecided" in outcomes else "FORGOTTEN"


def deciding(findings: Iterable[Finding]) -> list[Finding]:
    """Return those of one variant's findings that decide its verdict, every note, and every one on missing scores."""
    found = list(findings)
    shown = (DECIDES[variant_verdict(found)], "note")
    return [finding for finding in found if finding.outcome in shown or finding.kind == "no_score"]


def sentences(findings: Iterable[Finding]) -> list[str]:
    """Return one sentence for each variant, on what decides there, and one for each finding about the whole model."""
    return list(_sentences(findings))


def _sentences(findings: Iterable[Finding]) -> Iterator[str]:
    for variant, found in groupby(findings, key=lambda finding: finding.variant):
        if variant is None:
            yield from map(words, found)
        else:
            yield f"{variant}: {'; '.join(map(words, deciding(found)))}"


def out_of_reach_words(findings: Iterable[Finding]) -> str:
    """Say why no model can be found FORGOTTEN; "" without findings."""
    why = "; ".join(map(words, findings))
    return f"FORGOTTEN is out of reach here: {why}" if why else ""


def words(finding: Finding) -> str:
    """Say one finding in a sentence, without its variant."""
    return WORDS[finding.kind](finding)


def _knowledge_kept(f: Finding) -> str:
    return f"{_gate(f)}: keeps {number(f.value)} of the knowledge ({_bounds(f)}){_not_excluded(f)}"


def _facts_known(f: Finding) -> str:
    known = round((f.value or 0) * (f.n or 0))
    return f"{_gate(f)}: {known} of {f.n} facts known (at most {percent(f.high or 0)}){_not_excluded(f)}"


def _utility(f: Finding) -> str:
    text = f"{f.split} keeps {number(f.value)} of the original's score ({_bounds(f)})"
    return f"{text}; damage below {f.threshold:g} is not excluded" if f.outcome == "undecided" else text


def _items_lost(f: Finding) -> str:
    lost = round((f.value or 0) * (f.n or 0))
    text = f"{f.metric} on {f.split}: {lost} of {f.n} facts that the original knows are lost ({_bounds(f)})"
    return f"{text}; {percent(f.threshold or 0)} is not excluded" if f.outcome == "undecided" else text


def _too_few_facts(f: Finding) -> str:
    return f"{f.split} has {f.n} of the {f.value:g} facts that it takes to exclude {percent(f.threshold or 0)}"


def _fact_named(f: Finding) -> str:
    return f"it recites {f.detail}: the true answer stands out from {f.n} placebos (p = {f.p or 0:.2g})"


def _facts_traced(f: Finding) -> str:
    many = f"{f.value or 0:g} of {f.n} true answers stand out from their placebos"
    return f"a trace of knowledge: {many}, though the model recites none of these"


def _facts_together(f: Finding) -> str:
    return f"a trace of knowledge: {_rank(f, 'beat')}"


def _facts_open(f: Finding) -> str:
    return f"nothing can be said of {f.value or 0:g} of {f.n} facts, of the first since {f.detail}"


def _facts_suspicious(f: Finding) -> str:
    return f"{f.value or 0:g} of {f.n} facts seem to be known, in guesses with p = {f.p or 0:.2g}: {f.detail}"


def _facts_untold(f: Finding) -> str:
    told = f"it can tell {percent(f.value or 0)} of the facts that the original knows"
    return f"{_gate(f)}: {told}, of {percent(f.threshold or 0)} that it takes"


def _facts_need_control(f: Finding) -> str:
    return f"{_gate(f)}: {f.value or 0:g} of {f.n} facts have no placebos, and there is no never-taught control"


def _facts_below(f: Finding) -> str:
    return f"a trace of unlearning: {_rank(f, 'are beaten by')}"


def _rank(f: Finding, verb: str) -> str:
    share = f"{verb} {percent(f.value or 0)} of their placebos, 50 % where never taught"
    return f"of {f.n} facts the true answers {share} (p = {f.p or 0:.2g})"


def _gate(f: Finding) -> str:
    return f"{f.metric} on {f.split}"


def _not_excluded(f: Finding) -> str:
    return f"; {percent(f.threshold or 0)} is not excluded" if f.outcome == "undecided" else ""


def _bounds(f: Finding) -> str:
    return f"bounds {_bound(f.low, '−∞')} to {_bound(f.high, '∞')}"


def _bound(value: float | None, infinite: str) -> str:
    return infinite if value is None or math.isinf(value) else number(value)


WORDS: Mapping[FindingKind, Callable[[Finding], str]] = {
    "knowledge_kept": _knowledge_kept,
    "facts_known": _facts_known,
    "not_compared": lambda f: f"not measured: {_gate(f)}: {f.detail}",
    "answer_told": lambda f: (
        f"{_gate(f)}: {number(f.value)} where the prompt tells the answer, {f.detail}: teaching, no leak"
    ),
    "no_score": lambda f: f"{f.value:g} of {f.n} facts have no {f.metric} on {f.split} under {f.model}",
    "utility": _utility,
    "utility_not_measured": lambda f: f"utility was not measured{f' on {f.split}' if f.split else ''}: {f.detail}",
    "items_lost": _items_lost,
    "split_proves_nothing": lambda f: f"{f.split} proves nothing by {f.metric}: {f.detail}",
    "full_not_measured": lambda f: "full precision is not measured",
    "weights_unchanged": lambda f: str(f.detail),
    "served_differently": lambda f: str(f.detail),
    "no_control": lambda f: f"there is no never-taught control{f'; {f.detail}' if f.detail else ''}",
    "no_retain_split": lambda f: "there is no retain split, so that damage cannot be excluded",
    "too_few_facts": _too_few_facts,
    "fact_named": _fact_named,
    "facts_traced": _facts_traced,
    "facts_together": _facts_together,
    "facts_suspicious": _facts_suspicious,
    "facts_untold": _facts_untold,
    "facts_need_control": _facts_need_control,
    "facts_open": _facts_open,
    "facts_below": _facts_below,
    "verbatim": lambda f: (
        f"of {f.detail} ({f.split}) it continues {f.value or 0:g} tokens word for word, of {f.threshold:g} allowed"
    ),
    "policy_unmet": lambda f: f"the policy asks for {f.detail}",
    "control_failed": lambda f: f"{f.model} is left out, since it is no never-taught control: {f.detail}",
}
