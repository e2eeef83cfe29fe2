"""Metrics over teacher-forced token distributions: of the true answer, its paraphrase and the wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillknows import likelihood
from stillknows.registry import register
from stillknows.types import Floats, Ragged


@register("metric", role="example", source="arXiv 2401.06121")
def answer_probability(log_probs: Ragged) -> Floats:
    """exp(mean ln p) of the true answer's tokens, end of sequence included: 0..1, lower is more forgotten."""
    return np.exp(likelihood.mean_log_probs(log_probs))


@register("metric", role="example", source="arXiv 2401.06121 (probability of real authors and world facts)")
def normalised_probability(log_probs: Ragged, wrong_log_probs: Sequence[Ragged]) -> Floats:
    """P/(P + Σ P of the wrong answers), P = exp(mean ln p): 0..1, lower is more forgotten; NaN without wrong answers.

    Chance, a model that prefers no answer to another, is 1/(1 + number of wrong answers).
    """
    return likelihood.normalised_probability(log_probs, wrong_log_probs)


@register(
    "metric", role="example", source="arXiv 2401.06121 (truth ratio), arXiv 2506.12618 (as a measure of knowledge)"
)
def truth_ratio(
    log_probs: Ragged,
    paraphrase_log_probs: Ragged,
    wrong_log_probs: Sequence[Ragged],
    *,
    mean: likelihood.Averaging = "geometric",
    scale: Literal["share", "excess"] = "share",
) -> Floats:
    """How far the truth in other words is likelier than wrong answers: 0..1, lower is more forgotten.

    The ratio R of wrong to true (see likelihood.truth_ratio) is 0 for the perfect knower and has no upper end.

    Args:
        mean: over the wrong answers, "geometric" (published code and leaderboard) or "arithmetic" (paper).
        scale: "share", 1/(1 + R), in which ½ is no preference, as OpenUnlearning measures knowledge; "excess",
            max(0, 1 − R), in which 0 is no preference, as TOFU scores the data to keep.
    """
    ratio = likelihood.truth_ratio(log_probs, paraphrase_log_probs, wrong_log_probs, mean=mean)
    return 1 / (1 + ratio) if scale == "share" else np.maximum(0, 1 - ratio)


@register("metric", role="example", source="lm-evaluation-harness (acc), arXiv 2009.03300 (MMLU)")
def multiple_choice(
    log_probs: Ragged, wrong_log_probs: Sequence[Ragged], *, normalise: Literal["none", "tokens"] = "none"
) -> Floats:
    """1 where the true answer is likelier than every wrong one, else 0, lower is more forgotten; ties are shared.

    Chance is 1/(1 + number of wrong answers), in a tie of all answers too. NaN without wrong answers.

    Args:
        normalise: "none" compares Σ ln p, the probability of the whole answer, which favours short answers; "tokens"
            the mean ln p. (The harness's acc_norm divides by characters instead.)
    """
    return np.array(
        [_picks_first([true, *wrong], normalise) for true, wrong in zip(log_probs, wrong_log_probs, strict=True)]
    )


def _picks_first(answers: Ragged, normalise: str) -> float:
    """Return 1 where the first of the answers is the likeliest, 1/ties where others are as likely, else 0."""
    if len(answers) == 1 or any(answer.size == 0 for answer in answers):
        return np.nan
    values = np.array([answer.sum() if normalise == "none" else answer.mean() for answer in answers])
    if np.isnan(values).any():
        return np.nan
    best = values == values.max()
    return best[0] / best.sum()


@register("metric", role="example", source="arXiv 2205.10770 (exact memorisation)")
def exact_memorisation(hits: Ragged, ends: NDArray[np.bool_]) -> Floats:
    """Share of answer tokens that are the most likely ones, end of sequence left out: 0..1, lower is more forgotten."""
    return np.array([words.mean() if len(words) else np.nan for words in _without_end(hits, ends)], dtype=np.float64)


@register("metric", role="example", source="arXiv 2012.07805 (extraction), teacher-forced and free-running alike")
def extraction_strength(hits: Ragged, ends: NDArray[np.bool_]) -> Floats:
    """1 − k/T, k the shortest part of the answer after which all the rest is reproduced: 0..1, lower is more forgotten.

    T answer tokens without the end of sequence. 1: the prompt alone gives the whole answer; 0: not even its last token
    is reproduced (OpenUnlearning gives 1/T then, and counts the end of sequence).

    Teacher forcing measures what greedy decoding does: given the first k tokens it writes the most likely next one,
    which is the true one exactly if position k is a hit, then stands before the true prefix of k + 1 tokens, and so on
    by induction. So it writes the rest of the answer exactly if positions k..T−1 are all hits. (Ties between two most
    likely tokens and arithmetic that depends on the batch aside.)
    """
    return likelihood.extracted_share(_without_end(hits, ends))


@register("metric", role="example", source="Shannon 1948", measures="behaviour")
def entropy(entropies: Ragged) -> Floats:
    """Mean entropy of the next-token distribution at the true answer's tokens, in nats: 0 certain, ln V uniform.

    The end of sequence's place is included. It says how sure a model is, not how right: unlearning towards a uniform
    distribution raises it, and far above a never-taught control's it gives away what was unlearned.
    """
    return np.array([places.mean() if places.size else np.nan for places in entropies], dtype=np.float64)


def _without_end(hits: Ragged, ends: NDArray[np.bool_]) -> list[np.ndarray]:
    """Return each answer's hits without the end-of-sequence token."""
    return [answer[:-1] if end else answer for answer, end in zip(hits, ends, strict=True)]
