"""The placebo test of an audit: placebos that the models can read, and candidate scores from observations."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillknows.auditing.evidence import CellKey, Table, is_known
from stillknows.gate.candidate_scores import CandidateScores, logit
from stillknows.gate.candidates import NEED_CONTROL, Placebos, placebos, read_placebos
from stillknows.gate.placebo import Diffuse, PlaceboTest, placebo_test
from stillknows.likelihood import mean_log_probs
from stillknows.types import CONTROL, ORIGINAL, Benchmark, Finding, FindingKind, Floats, Observations

SEPARATOR = ": "  # between the name of a variant and that of an attack's wording


def readable_placebos(
    benchmark: Benchmark, tokenizer: Any, vocabulary: int, count: int, file: Path | None = None
) -> Placebos:
    """Return placebos that a model can read as well as the true answers: without unknown tokens where those have none.

    Args:
        vocabulary: how many tokens the models embed.
        file: the user's own, see `candidates.read_placebos`.
    """

    @functools.cache
    def unreadable(answer: str) -> bool:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return not ids or max(ids) >= vocabulary or tokenizer.unk_token_id in ids

    def fits(answer: str, truth: str) -> bool:
        return not unreadable(answer) or unreadable(truth)

    return placebos(benchmark, given=file and read_placebos(file), fits=fits, count=count)


def fact_test(
    observations: Mapping[CellKey, Observations], subject: str, splits: Sequence[str], answers: Placebos
) -> PlaceboTest | None:
    """Test which facts a model knows, by its answers on the splits to forget; None where no placebos were observed.

    What a never-taught control finds likely as well is taken away, and the original's scores measure the power.
    Without a control facts are untestable whose placebos come from a source in NEED_CONTROL.
    """
    models = [CONTROL] if any(place.model == CONTROL for place in observations) else []
    scores = {model: candidate_scores(observations, model, splits) for model in (subject, ORIGINAL, *models)}
    mine, original = scores[subject], scores[ORIGINAL]
    controls = [found for model in models if (found := scores[model]) is not None]
    if mine is None or original is None:
        return None
    reasons = {} if controls else _need_control(answers)
    return placebo_test(mine, controls, original, excluded=reasons)


def _need_control(answers: Placebos) -> dict[str, str]:
    return {
        fact: f"its placebos ({source}) need a never-taught control"
        for (fact, _), source in answers.sources.items()
        if source in NEED_CONTROL
    }


def recited(table: Table, place: CellKey, gates: Sequence[str]) -> frozenset[str]:
    """Return the facts that count as known to a model in one variant on one split, by some gate; without a control its
    score is taken to be 0."""
    found: set[str] = set()
    for gate in gates:
        s, o = (table.get(model, place.variant, place.split, gate) for model in (place.model, ORIGINAL))
        c = table.get(CONTROL, place.variant, place.split, gate) if table.has_control else np.zeros_like(o)
        found |= {fact for fact, known in zip(table.facts[place], is_known(s, c, o), strict=True) if known}
    return frozenset(found)


def fact_leaks(test: PlaceboTest, variant: str, answered: Collection[str]) -> Iterator[Finding]:
    """Yield the facts that a model recites in one variant: `answered` there, and named by the test there."""
    for fact in test.named:
        if fact.fact in answered and any(_belongs(name, variant) for name in fact.variants):
            yield Finding(
                "fact_named", "leak", variant, threshold=test.alpha, p=fact.p, n=fact.placebos, detail=fact.fact
            )


def fact_notes(test: PlaceboTest, leaks: Collection[Finding]) -> Iterator[Finding]:
    """Yield what the test says of a model in general: traces of knowledge that it does not recite, alone and together,
    how much the test cannot tell, and whether truths lie below guesses.

    Args:
        leaks: what `fact_leaks` has found in all variants.
    """
    traces = {fact.fact for fact in test.named} - {leak.detail for leak in leaks}
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
    if test.untestable:
        yield Finding("facts_untestable", "note", value=len(test.untestable), n=len(test.facts))


class _Item(NamedTuple):
    """One item of a fact, as one model answers it: variant and wording, and the scores of truth and placebos, [C]."""

    variant: str
    scores: Floats


def candidate_scores(
    observations: Mapping[CellKey, Observations], model: str, splits: Sequence[str]
) -> CandidateScores | None:
    """Return the scores of one model's candidates on the splits to forget; None where no placebos were observed.

    A score is the logit of the answer probability, exp(mean ln p) over an answer's tokens without the one that ends it.
    The splits ask for the same facts in other words, so that their items are wordings of one fact. Each wording of an
    attack counts as a variant: the worst is taken, for placebos as for the truth. An item whose fact has fewer placebos
    elsewhere is scored with as many as it has there; one that has none, though elsewhere its fact does, is left out.
    """
    items: dict[str, list[_Item]] = {}
    for (label, variant, split), seen in observations.items():
        if label == model and split in splits:
            if seen.placebo_log_probs is None:
                return None
            for fact, item in _items(variant, seen):
                items.setdefault(fact, []).append(item)
    compared = {fact: [item for item in found if len(item.scores) > 1] or found for fact, found in items.items()}
    return _tabulated(compared) if items else None


def _belongs(name: str, variant: str) -> bool:
    """Tell whether a name in candidate scores is a variant's, alone or with a wording behind it."""
    return name == variant or name.startswith(f"{variant}{SEPARATOR}")


def _items(variant: str, seen: Observations) -> list[tuple[str, _Item]]:
    found = []
    for i, fact in enumerate(seen.facts):
        name = SEPARATOR.join(filter(None, (variant, seen.wordings[i] if seen.wordings else "")))
        rows = [(seen.log_probs or ())[i], *(seen.placebo_log_probs or ())[i]]
        ends = seen.ends is not None and bool(seen.ends[i])
        scores = logit(mean_log_probs([row[:-1] if ends and len(row) > 1 else row for row in rows]))
        found.append((fact, _Item(name, scores)))
    return found


def _tabulated(items: Mapping[str, Sequence[_Item]]) -> CandidateScores:
    variants = list(dict.fromkeys(item.variant for found in items.values() for item in found))
    counts = {fact: min(len(item.scores) for item in found) for fact, found in items.items()}
    wordings = max(sum(item.variant == variant for item in found) for found in items.values() for variant in variants)
    values = np.full((len(items), max(counts.values()), wordings, len(variants)), np.nan)
    asked = np.zeros((len(items), wordings, len(variants)), dtype=bool)
    for f, (fact, found) in enumerate(items.items()):
        for item in found:
            v = variants.index(item.variant)
            w = int(asked[f, :, v].sum())
            values[f, : counts[fact], w, v] = item.scores[: counts[fact]]
            asked[f, w, v] = True
    there = np.arange(values.shape[1]) < np.array(list(counts.values()))[:, None]
    return CandidateScores(tuple(items), tuple(variants), values, there, asked)
