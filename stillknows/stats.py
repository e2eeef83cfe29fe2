"""Intervals and corrections. All functions take plain arrays; none knows what a model is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stillknows.types import Floats

RESAMPLES = 4000


def bootstrap(statistic: Callable[..., Floats], *columns: Floats, seed: int = 0) -> Floats:
    """Return the statistic over RESAMPLES resamples of the rows, drawn jointly from all columns.

    Args:
        statistic: maps arrays [..., n] to [...] by reducing the last axis.
        columns: arrays [n]; row i of each belongs to the same unit (fact), so the resampling is paired.

    The percentile bootstrap (Efron 1979) of cluster means; it is too narrow below about ten units and is exactly
    one point where all units agree, which is why verdicts ask for an exact bound beside it.
    """
    n = len(columns[0])
    rows = np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, n))
    with np.errstate(divide="ignore", invalid="ignore"):
        return statistic(*(column[rows] for column in columns))


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the number of tests by Holm's step-down method (1979), in the given order."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted.tolist()
