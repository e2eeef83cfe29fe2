"""Array formulas that metrics and figures share: one number per example from its answers' token log-probabilities.

All functions return [N] float64, NaN where an example has nothing to score. P is the length-normalised probability of
an answer, exp(mean ln p) over its tokens; it is kept as its logarithm, so that improbable answers still compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from stillknows.types import Floats, Ragged

Averaging = Literal["geometric", "arithmetic"]


def mean_log_probs(log_probs: Ragged) -> Floats:
    """Return ln P, the mean of ln p over each answer's tokens: nats, at most 0, the negative of the cross-entropy."""
    return np.array([answer.mean() if answer.size else np.nan for answer in log_probs], dtype=np.float64)


def extracted_share(hits: Ragged) -> Floats:
    """Return the share of each answer's tokens at its end that are all hits: 0..1, `extraction_strength`."""
    found = np.full(len(hits), np.nan)
    for i, answer in enumerate(hits):
        misses = np.flatnonzero(~np.asarray(answer))
        if len(answer):
            found[i] = (len(answer) - misses[-1] - 1) / len(answer) if misses.size else 1.0
    return found


def normalised_probability(log_probs: Ragged, wrong_log_probs: Sequence[Ragged]) -> Floats:
    """Return P_true / (P_true + Σ P_wrong): 0..1, the true answer's share among the answers on offer.

    A model without a preference gives 1/(1 + number of wrong answers); an example without any is NaN. Source: TOFU
    (arXiv 2401.06121), for real authors and world facts. OpenUnlearning adds 1e-10 to the denominator; this does not.
    """
    true = mean_log_probs(log_probs)
    wrong = np.array([_log_sum(mean_log_probs(answers)) for answers in wrong_log_probs], dtype=np.float64)
    with np.errstate(over="ignore"):  # wrong answers that are e^709 times likelier leave a share of 0
        return 1 / (1 + np.exp(wrong - true))


def truth_ratio(
    log_probs: Ragged,
    paraphrase_log_probs: Ragged,
    wrong_log_probs: Sequence[Ragged],
    *,
    mean: Averaging = "geometric",
) -> Floats:
    """Return R = mean of P_wrong / P_paraphrase: 0..∞, below 1 where the true answer is the likelier one.

    Args:
        log_probs: [N] of the true answer.
        paraphrase_log_probs: [N] of the true answer in other words; where that is empty the true answer itself takes
            its place, as in TOFU for real authors and world facts.
        wrong_log_probs: [N] × one per wrong answer; an example without any is NaN.
        mean: over the wrong answers. "geometric" is exp(mean of ln P), as in TOFU's published code and its
            leaderboard; "arithmetic", the mean of P, is the formula of its paper and is never smaller.

    Source: TOFU (arXiv 2401.06121, section 2.2.2). OpenUnlearning adds 1e-10 to the denominator; this does not.
    """
    answers = zip(paraphrase_log_probs, log_probs, strict=True)
    stated = mean_log_probs([paraphrase if paraphrase.size else true for paraphrase, true in answers])
    average = _log_mean if mean == "arithmetic" else _mean
    wrong = np.array([average(mean_log_probs(answers)) for answers in wrong_log_probs], dtype=np.float64)
    with np.errstate(over="ignore"):  # beyond e^709 the ratio is infinite
        return np.exp(wrong - stated)


def lowest_mean(values: Ragged, k: float) -> Floats:
    """Return the mean of the int(n·k) lowest of each example's n values, but of one at least: the Min-K % score.

    `k` is a share, 0..1. Source: arXiv 2310.16789. Where int(n·k) is 0 the published code of Min-K % and of MUSE
    averages nothing and returns NaN; OpenUnlearning takes one value, as this does.
    """
    lowest = [np.sort(row)[: max(1, int(row.size * k))] for row in values]
    return np.array([row.mean() if row.size else np.nan for row in lowest], dtype=np.float64)


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else np.nan


def _log_sum(values: Floats) -> float:
    """Return ln Σ exp(values), NaN for none."""
    if values.size == 0 or np.isnan(values).any():
        return np.nan
    return float(np.logaddexp.reduce(values))


def _log_mean(values: Floats) -> float:
    """Return ln of the mean of exp(values), NaN for none."""
    return _log_sum(values) - float(np.log(values.size)) if values.size else np.nan
