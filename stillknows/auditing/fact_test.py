"""The placebo test of an audit: placebos that the models can read, and candidate scores from observations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillknows.auditing.evidence import CellKey
from stillknows.gate.candidate_scores import CandidateScores, logit
from stillknows.gate.candidates import NEED_CONTROL, Placebos, placebos, read_placebos
from stillknows.gate.placebo import ALPHA, ALPHA_STRICT, FactResult, PlaceboTest, placebo_test
from stillknows.labels import is_control
from stillknows.likelihood import mean_log_probs
from stillknows.types import ORIGINAL, Benchmark, Floats, Observations

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
    observations: Mapping[CellKey, Observations],
    subject: str,
    splits: Sequence[str],
    answers: Placebos,
    controls: Sequence[str] | None = None,
    attacks: Collection[str] = (),
) -> PlaceboTest | None:
    """Test which facts a model knows, by its answers on the splits to forget; None where no placebos were observed.

    Single facts are tested in the deployments and in the `attacks`, each at an error rate of its own, ALPHA or
    ALPHA_STRICT: what is tried besides does not weaken what is found in a deployment.

    What the never-taught `controls` (None: all that were observed) find likely as well is taken away, and the
    original's scores measure the power. Without a control facts are untestable whose placebos come from a source in
    NEED_CONTROL.
    """
    if controls is None:
        controls = [*dict.fromkeys(place.model for place in observations if is_control(place.model))]
    mine, original, *others = (
        candidate_scores(observations, model, splits) for model in (subject, ORIGINAL, *controls)
    )
    if mine is None or original is None:
        return None
    reasons = {} if controls else need_control(answers)
    alpha = ALPHA if controls else ALPHA_STRICT

    def test(chosen: Callable[[str], bool], alpha: float) -> PlaceboTest | None:
        models = [scores.within(chosen) for scores in (mine, original, *filter(None, others))]
        own, first, *rest = (scores for scores in models if scores) if models[0] else (None, None)
        return placebo_test(own, rest, first, excluded=reasons, alpha=alpha) if own else None

    whole = placebo_test(mine, [found for found in others if found], original, excluded=reasons, alpha=alpha)
    under_attack = {name for name in mine.variants if any(belongs(name, attack) for attack in attacks)}
    if not under_attack or len(under_attack) == len(mine.variants):
        return whole
    deployed, attacked = test(lambda v: v not in under_attack, alpha), test(lambda v: v in under_attack, ALPHA_STRICT)
    return _by_role(whole, [found for found in (deployed, attacked) if found])


def _by_role(whole: PlaceboTest, roles: Sequence[PlaceboTest]) -> PlaceboTest:
    """Return a test of all variants with the facts that the tests of its parts name."""
    by_fact = [{fact.fact: fact for fact in test.facts} for test in roles]

    def merged(fact: FactResult) -> FactResult:
        found = [facts[fact.fact] for facts in by_fact if fact.fact in facts]
        best = min(found, key=lambda one: one.p)
        return replace(
            fact,
            p=best.p,
            variant=best.variant,
            named=any(one.named for one in found),
            variants=tuple(name for one in found for name in one.variants),
            found=_any(one.found for one in found),
            found_half=_any(one.found_half for one in found),
            untestable=min((one.untestable for one in found), key=len),
        )

    return replace(whole, facts=tuple(map(merged, whole.facts)))


def _any(flags: Iterable[bool | None]) -> bool | None:
    """Return whether one is true; None where all are None."""
    known = [flag for flag in flags if flag is not None]
    return any(known) if known else None


def need_control(answers: Placebos) -> dict[str, str]:
    """Return the facts whose placebos say nothing without a control, and why."""
    return {
        fact: f"its placebos ({source}) need a never-taught control"
        for (fact, _), source in answers.sources.items()
        if source in NEED_CONTROL
    }


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


def belongs(name: str, variant: str) -> bool:
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
