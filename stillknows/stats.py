"""Intervals, comparisons of two samples, and corrections. All functions take plain arrays; none knows what a model is.

Resamples are made once as a table of counts, how often each row is drawn in each resample, [RESAMPLES, n]. Means, AUC
and distribution functions of all resamples are then products with that table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from stillknows.types import Floats, Interval

RESAMPLES = 4000
SMALL = 1000  # units, up to which a table of draws is kept for the next statistic: 32 MB
LEVEL = 0.95  # of each one-sided bound of an Interval


def bootstrap_counts(units: Sequence[str], seed: int = 0) -> Floats:
    """Return how often each row is drawn when its unit is: [RESAMPLES, n]; rows of one unit are drawn together.

    Equal units and seeds give equal draws, so that what was observed on the same rows can be resampled as pairs.
    """
    _, unit = np.unique(np.asarray(units), return_inverse=True)
    return resampled_counts(int(unit.max()) + 1, seed)[:, unit]


def resampled_counts(n: int, seed: int = 0) -> Floats:
    """Return how often each of n units is drawn in each resample, [RESAMPLES, n]; small tables are kept."""
    if n == 0:
        return np.empty((RESAMPLES, 0))
    return _kept_counts(n, RESAMPLES, seed) if n <= SMALL else _count(n, RESAMPLES, seed)


@lru_cache(maxsize=8)  # a report asks for the same few sizes again and again
def _kept_counts(n: int, resamples: int, seed: int) -> Floats:
    return _count(n, resamples, seed)


def _count(n: int, resamples: int, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    counts = np.empty((resamples, n))
    for row in counts:  # one by one: all rows drawn at once take twice the memory of the table
        row[:] = np.bincount(generator.integers(0, n, size=n), minlength=n)
    counts.flags.writeable = False
    return counts


def bootstrap(statistic: Callable[..., Floats], *columns: Floats, seed: int = 0) -> Floats:
    """Return the statistic over RESAMPLES resamples of the rows, drawn jointly from all columns.

    Args:
        statistic: a function of the columns' means or of ratios of their sums that reduces the last axis, such as
            `a.sum(-1) / b.sum(-1)`. It is given the means, [RESAMPLES, 1], in the place of the rows: nothing else can
            be resampled this way.
        columns: finite arrays [n]; row i of each belongs to the same unit (fact), so the resampling is paired.

    The percentile bootstrap (Efron 1979) of cluster means; it is too narrow below about ten units and is one point, up
    to rounding, where all units agree, which is why verdicts ask for an exact bound beside it.
    """
    n = len(columns[0])
    counts = resampled_counts(n, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return statistic(*((counts @ column / n)[:, None] for column in columns))


def resampled_mean(values: Floats, drawn: Floats) -> Floats:
    """Return the mean of the drawn rows in every resample, [RESAMPLES]."""
    return drawn @ values / drawn.sum(1)


def mean_interval(values: Floats, units: Sequence[str]) -> Interval:
    """Return the mean of values [n] with bounds at LEVEL from resampling their units; n counts the units."""
    resamples = resampled_mean(values, bootstrap_counts(units))
    return interval(float(values.mean()), resamples, len(set(units)))


def interval(value: float, resamples: Floats, n: int) -> Interval:
    """Return a number over n units with the percentile bounds of its resamples, each at LEVEL."""
    return Interval(value, *bounds(resamples, LEVEL), n)


def jackknife_interval(value: float, left_out: Floats) -> Interval:
    """Return a number over n units with bounds value ± z·√((n − 1)/n · Σ(v_i − v̄)²), each at LEVEL, of what it is with
    each unit left out, [n]: Tukey's jackknife (1958), for numbers that resamples with repeated rows would distort."""
    from scipy.stats import norm

    n = len(left_out)
    error = float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))
    margin = float(norm.ppf(LEVEL)) * error
    return Interval(value, value - margin, value + margin, n)


def bounds(resamples: Floats, level: float) -> tuple[float, float]:
    """Return the one-sided lower and upper percentile bounds, each at `level` (together: 2·level − 1).

    Resamples in which a ratio has no denominator (NaN) are left out; infinities count.
    """
    kept = resamples[~np.isnan(resamples)]
    if kept.size == 0:
        return float("-inf"), float("inf")
    low, high = np.quantile(kept, [1 - level, level], method="inverted_cdf")
    return float(low), float(high)


def p_value_at_most(resamples: Floats, threshold: float) -> float:
    """Return the bootstrap p-value of "the statistic is at most `threshold`": (1 + #{r ≤ threshold}) / (1 + B)."""
    kept = resamples[~np.isnan(resamples)]
    return float((1 + np.count_nonzero(kept <= threshold)) / (1 + kept.size))


def binomial_bounds(successes: int, trials: int, level: float) -> tuple[float, float]:
    """Return the exact one-sided Clopper–Pearson bounds (1934) of a rate in 0..1, each at `level`.

    0 of n gives the upper bound 1 − (1 − level)^(1/n): 29 clean trials for 10 %, 299 for 1 % at 95 %.
    """
    from scipy.stats import binomtest

    test = binomtest(successes, trials, alternative="two-sided")
    interval = test.proportion_ci(confidence_level=2 * level - 1, method="exact")
    return float(interval.low), float(interval.high)


def at_least(count: int, chances: Sequence[float]) -> float:
    """Return how likely so many or more of independent events with these chances happen: 0..1."""
    found = np.ones(1)
    for chance in chances:
        found = np.convolve(found, [1 - chance, chance])
    return min(1.0, float(found[count:].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the number of tests by Holm's step-down method (1979), in the given order."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted.tolist()


def auc(positives: Floats, negatives: Floats) -> float:
    """Return P(positive > negative) + ½·P(equal) over all pairs: 0..1, the area under the ROC curve; ½ is chance."""
    from scipy.stats import rankdata

    n = len(positives)
    ranks = rankdata(np.concatenate([positives, negatives]))[:n]
    return float((ranks.sum() - n * (n + 1) / 2) / (n * len(negatives)))


def resampled_auc(positives: Floats, negatives: Floats, drawn: Floats, drawn_negatives: Floats) -> Floats:
    """Return the AUC in every resample of the positives and of the negatives, [RESAMPLES]."""
    won = outranked(positives, negatives)
    return ((drawn @ won) * drawn_negatives).sum(1) / (drawn.sum(1) * drawn_negatives.sum(1))


def outranked(positives: Floats, negatives: Floats) -> Floats:
    """Return [n, m]: 1 where the positive scores higher than the negative, ½ where they tie, 0 elsewhere."""
    column = positives[:, None]
    return (column > negatives) + (column == negatives) / 2


def tpr_at_fpr(positives: Floats, negatives: Floats, fpr: float = 0.01) -> float:
    """Return the share of positives above the lowest threshold that at most `fpr` of the negatives exceed: 0..1.

    With m negatives ⌊fpr·m⌋ may, so 1 % needs 100 of them. For samples drawn alike it is (1 + ⌊fpr·m⌋)/(1 + m) on
    average, .0198 for 1 % of 100. Source: Carlini et al., arXiv 2112.03570.
    """
    everything = np.ones((1, len(positives))), np.ones((1, len(negatives)))
    return float(resampled_tpr_at_fpr(positives, negatives, *everything, fpr)[0])


def resampled_tpr_at_fpr(
    positives: Floats, negatives: Floats, drawn: Floats, drawn_negatives: Floats, fpr: float = 0.01
) -> Floats:
    """Return the true positive rate at a false positive rate in every resample, [RESAMPLES]."""
    order = np.argsort(-negatives, kind="stable")
    exceeding = np.cumsum(drawn_negatives[:, order], axis=1)
    allowed = fpr * exceeding[:, -1:] + 1e-9  # 0.29 · 100 is 28.999999999999996
    threshold = (exceeding > allowed).argmax(1)  # the first negative that is one too many
    above = (positives[:, None] > negatives[order]).astype(np.float64)
    return (drawn @ above)[np.arange(len(drawn)), threshold] / drawn.sum(1)


def resampled_top_auc(
    positives: Floats, negatives: Floats, drawn: Floats, drawn_negatives: Floats, top: float = 0.1
) -> Floats:
    """Return, in every resample, the AUC of the highest-scoring ⌈top·n⌉ positives alone against all negatives."""
    order = np.argsort(-positives, kind="stable")
    reached = np.cumsum(drawn[:, order], axis=1)
    size = np.ceil(top * reached[:, -1:] - 1e-9)
    taken = np.diff(np.minimum(reached, size), axis=1, prepend=0.0)
    return resampled_auc(positives[order], negatives, taken, drawn_negatives)


def ks_two_sample(a: Floats, b: Floats) -> tuple[float, float]:
    """Return Kolmogorov and Smirnov's D = max |F_a − F_b|, 0..1, and the two-sided p-value of "drawn alike".

    scipy's `ks_2samp` with its default method (exact up to 10,000 values each), as the published code of TOFU calls it.
    """
    from scipy.stats import ks_2samp

    test: Any = ks_2samp(a, b)
    return float(test.statistic), float(test.pvalue)


def ks_bounds(a: Floats, b: Floats, drawn_a: Floats, drawn_b: Floats) -> tuple[float, float]:
    """Return one-sided bounds of D, each at LEVEL: D ± the quantile of max |(F*_a − F*_b) − (F_a − F_b)|, in 0..1.

    A bootstrap band around the difference of the distribution functions. Percentiles of D itself would not do: it is a
    maximum, resamples of equal samples lie above 0, and the bounds would exclude the truth.
    """
    points = np.unique(np.concatenate([a, b]))
    below_a, below_b = (np.asarray(x[:, None] <= points, dtype=np.float64) for x in (a, b))
    gap = below_a.mean(0) - below_b.mean(0)
    gaps = drawn_a @ below_a / drawn_a.sum(1, keepdims=True) - drawn_b @ below_b / drawn_b.sum(1, keepdims=True)
    margin = float(np.quantile(np.abs(gaps - gap).max(1), LEVEL, method="inverted_cdf"))
    d = float(np.abs(gap).max())
    return max(0.0, d - margin), min(1.0, d + margin)


def harmonic_mean(parts: Floats) -> Floats:
    """Return n / Σ 1/x over the first axis, for x ≥ 0; 0 as soon as one part is."""
    from scipy.stats import hmean

    return hmean(parts, axis=0)
