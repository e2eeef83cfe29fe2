"""TOFU's two numbers: how good the model still is, and how like the retrained model it is on what was forgotten."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stillknows.errors import NotMeasured
from stillknows.likelihood import Averaging, mean_log_probs, normalised_probability, truth_ratio
from stillknows.registry import bind, register
from stillknows.scoring import drop_unscored, observed, score
from stillknows.stats import (
    bootstrap_counts,
    harmonic_mean,
    interval,
    ks_bounds,
    ks_two_sample,
    mean_interval,
    resampled_mean,
)
from stillknows.types import Floats, Interval, Observations

ROUGE = "rouge_l:score=recall:stemmer=true"
CHOICES = ("log_probs", "paraphrase_log_probs", "wrong_log_probs")


@register("metric", role="model", source="arXiv 2401.06121 (TOFU), leaderboard code of locuslab/tofu", reads=CHOICES)
def forget_quality(
    subject: Mapping[str, Observations],
    control: Mapping[str, Observations] | None,
    *,
    split: str = "forget",
    mean: Averaging = "geometric",
) -> dict[str, Interval]:
    """Kolmogorov–Smirnov test of the truth ratios R against the retrained model's, on the forget split.

    Returns:
        forget_quality: the p-value, 0..1; higher is more like the retrained model. It falls by orders of magnitude as
            D moves a little or N grows: read `ks_statistic` first. Its bounds are the p-values of D's bounds in the
            limit distribution.
        ks_statistic: D, the largest distance of the two distribution functions, 0..1; lower is more like the retrained.

    Args:
        split: where it is measured.
        mean: of the wrong answers in R; TOFU's published code averages geometrically, its paper arithmetically.
    """
    if control is None:
        raise NotMeasured("there is no retrained model to compare with")
    (a, units_a), (b, units_b) = (_truth_ratios(splits, split, mean) for splits in (subject, control))
    d, p = ks_two_sample(a, b)
    low, high = ks_bounds(
        a, b, bootstrap_counts(units_a), bootstrap_counts(units_b, seed=0 if set(units_a) == set(units_b) else 1)
    )
    p_low, p_high = (_limit_p_value(bound, len(a), len(b)) for bound in (high, low))
    return {
        "forget_quality": Interval(p, min(p, p_low), max(p, p_high), len(a)),
        "ks_statistic": Interval(d, low, high, len(a)),
    }


@register(
    "metric",
    role="model",
    source="arXiv 2401.06121 (TOFU), leaderboard code of locuslab/tofu",
    reads=(*CHOICES, "generations"),
)
def forget_scores(
    subject: Mapping[str, Observations],
    control: Mapping[str, Observations] | None,
    *,
    split: str = "forget",
    mean: Averaging = "geometric",
) -> dict[str, Interval]:
    """What TOFU averages over the forget split: probability, ROUGE-L recall and truth ratio, all 0..1.

    Returns `forget_probability` and `forget_rouge`, lower is more forgotten, and `forget_truth_ratio`, the mean of
    min(R, 1/R): 1 where the true answer is as likely as the false ones, so higher is more forgotten, and lower again
    where it is avoided.

    Args:
        split: where they are measured.
        mean: of the wrong answers in R; TOFU's published code averages geometrically, its paper arithmetically.
    """
    log_probs, _, facts = observed(subject, split, "log_probs", "generations", "facts")
    ratios, units = _truth_ratios(subject, split, mean)
    with np.errstate(divide="ignore"):
        balance = np.minimum(ratios, 1 / ratios)
    return {
        "forget_probability": mean_interval(*drop_unscored(np.exp(mean_log_probs(log_probs)), facts, split)),
        "forget_rouge": mean_interval(*drop_unscored(score(bind("metric", ROUGE), subject[split]), facts, split)),
        "forget_truth_ratio": mean_interval(balance, units),
    }


@register("metric", role="model", source="arXiv 2401.06121 (TOFU), table 3", reads=(*CHOICES, "generations"))
def model_utility(
    subject: Mapping[str, Observations],
    control: Mapping[str, Observations] | None,
    *,
    retain: str = "retain",
    real_authors: str = "real_authors",
    world_facts: str = "world_facts",
    mean: Averaging = "geometric",
) -> dict[str, Interval]:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio on three splits to keep: 0..1, higher is better.

    Returns `model_utility` and its nine parts, each a mean over a split's examples, 0..1, higher is better:
    `<split>.probability` is P of the answer on the retain split and its share among the answers on offer on the other
    two, `<split>.rouge` ROUGE-L recall with stems of the greedy answer, `<split>.truth_ratio` max(0, 1 − R).

    Args:
        retain: name of the split to keep.
        real_authors: name of the split about real authors.
        world_facts: name of the split about the world.
        mean: of the wrong answers in R; TOFU's published code averages geometrically, its paper arithmetically.
    """
    values: dict[str, Interval] = {}
    resamples: list[Floats] = []
    for seed, name in enumerate((retain, real_authors, world_facts)):  # splits are resampled separately
        for label, (scores, units) in _parts(subject, name, offered=name != retain, mean=mean).items():
            resamples.append(resampled_mean(scores, bootstrap_counts(units, seed)))
            values[f"{name}.{label}"] = interval(float(scores.mean()), resamples[-1], len(set(units)))
    total = float(harmonic_mean(np.array([part.value for part in values.values()])))
    n = sum(values[f"{name}.rouge"].n for name in (retain, real_authors, world_facts))
    return {"model_utility": interval(total, harmonic_mean(np.array(resamples)), n), **values}


def _parts(
    splits: Mapping[str, Observations], name: str, *, offered: bool, mean: Averaging
) -> dict[str, tuple[Floats, list[str]]]:
    """Return a split's three scores per example with their facts; `offered`: P is shared among the answers on offer."""
    log_probs, wrong_log_probs, _, facts = observed(
        splits, name, "log_probs", "wrong_log_probs", "generations", "facts"
    )
    probability = normalised_probability(log_probs, wrong_log_probs) if offered else np.exp(mean_log_probs(log_probs))
    ratios, units = _truth_ratios(splits, name, mean)
    return {
        "probability": drop_unscored(probability, facts, name),
        "rouge": drop_unscored(score(bind("metric", ROUGE), splits[name]), facts, name),
        "truth_ratio": (np.maximum(0, 1 - ratios), units),
    }


def _truth_ratios(splits: Mapping[str, Observations], name: str, mean: Averaging) -> tuple[Floats, list[str]]:
    """Return R of the split's examples with their facts."""
    *choices, facts = observed(splits, name, *CHOICES, "facts")
    return drop_unscored(truth_ratio(*choices, mean=mean), facts, name)


def _limit_p_value(d: float, n: int, m: int) -> float:
    from scipy.special import kolmogorov

    return float(kolmogorov(d * np.sqrt(n * m / (n + m))))
