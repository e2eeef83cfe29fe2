"""MUSE's numbers, in percent: what is recited, what is known, and whether membership of the forget set still shows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stillknows.errors import NotMeasured
from stillknows.registry import bind, register
from stillknows.scoring import drop_unscored, observed, score
from stillknows.stats import auc, bootstrap_counts, interval, mean_interval, resampled_auc
from stillknows.types import Floats, Interval, Observations

PERCENT = 100


@register("metric", role="model", source="arXiv 2407.06460 (MUSE), VerbMem", reads=("generations",))
def verbmem(
    subject: Mapping[str, Observations], control: Mapping[str, Observations] | None, *, split: str = "verbmem"
) -> dict[str, Interval]:
    """Mean ROUGE-L F1, no stems, of the continuations of forgotten texts: 0..100 percent, lower is more forgotten."""
    return {"verbmem": _rouge(subject, split)}


@register("metric", role="model", source="arXiv 2407.06460 (MUSE), KnowMem", reads=("generations",))
def knowmem(
    subject: Mapping[str, Observations],
    control: Mapping[str, Observations] | None,
    *,
    forget: str = "knowmem_forget",
    retain: str = "knowmem_retain",
) -> dict[str, Interval]:
    """Mean ROUGE-L F1, no stems, of the answers to questions: 0..100 percent.

    Returns `knowmem_forget`, lower is more forgotten, and `knowmem_retain`, higher is better kept.

    Args:
        forget: name of the split of questions about what was to be forgotten.
        retain: name of the split of questions about what was to be kept.
    """
    return {"knowmem_forget": _rouge(subject, forget), "knowmem_retain": _rouge(subject, retain)}


@register("metric", role="model", source="arXiv 2407.06460 (MUSE), PrivLeak", reads=("log_probs",))
def privleak(
    subject: Mapping[str, Observations],
    control: Mapping[str, Observations] | None,
    *,
    auc_retrain: float | None = None,
    k: float = 0.4,
    members: str = "privleak_forget",
    holdouts: str = "privleak_holdout",
) -> dict[str, Interval]:
    """100·(AUC − AUC_retrain)/AUC_retrain of the Min-K % attack: percent, near 0 is good, no bound above.

    AUC is P(a holdout text looks more like a member than a forget text), as in MUSE: near 0, and PrivLeak near −100,
    where the forget texts are still memorised; ½ where they look alike; positive PrivLeak is over-unlearning, which
    shows membership as well.

    Returns `privleak` and `privleak_auc`. Raises NotMeasured without `auc_retrain` and a control.

    Args:
        auc_retrain: AUC of the retrained model; none: the control's own, resampled over the same texts.
        k: share of lowest token log-probabilities that are averaged.
        members: name of the split of texts that were to be forgotten.
        holdouts: name of the split of texts that the original was never trained on.
    """
    forget, units = _lowest(subject, members, k)
    holdout, holdout_units = _lowest(subject, holdouts, k)
    drawn = bootstrap_counts(holdout_units, seed=1), bootstrap_counts(units)
    value, resamples = auc(holdout, forget), resampled_auc(holdout, forget, *drawn)
    if auc_retrain is None:
        if control is None:
            raise NotMeasured("there is neither a retrained model nor its AUC to compare with")
        (known, known_units), (unknown, unknown_units) = _lowest(control, members, k), _lowest(control, holdouts, k)
        if (known_units, unknown_units) != (units, holdout_units):
            raise NotMeasured("the control was not observed on the same texts")
        base, bases = auc(unknown, known), resampled_auc(unknown, known, *drawn)
    else:
        base = bases = auc_retrain
    if base == 0:
        raise NotMeasured("the retrained model's AUC is 0, which nothing can be compared with")
    with np.errstate(divide="ignore", invalid="ignore"):  # resamples in which the retrained model's AUC is 0
        changes = PERCENT * (resamples - bases) / bases
    n = len(set(units)) + len(set(holdout_units))
    return {
        "privleak": interval(PERCENT * (value - base) / base, changes, n),
        "privleak_auc": interval(value, resamples, n),
    }


def _rouge(splits: Mapping[str, Observations], name: str) -> Interval:
    _, facts = observed(splits, name, "generations", "facts")
    scores, units = drop_unscored(
        score(bind("metric", "rouge_l:score=fmeasure:stemmer=false"), splits[name]), facts, name
    )
    return mean_interval(PERCENT * scores, units)


def _lowest(splits: Mapping[str, Observations], name: str, k: float) -> tuple[Floats, list[str]]:
    """Return the Min-K % scores of a split's texts, higher for members, with their facts."""
    _, facts = observed(splits, name, "log_probs", "facts")
    return drop_unscored(score(bind("metric", f"min_k:k={k}"), splits[name]), facts, name)
