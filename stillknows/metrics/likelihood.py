"""Metrics over the teacher-forced probabilities of the true answer's tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stillknows.registry import register
from stillknows.types import Floats, Ragged


@register("metric", source="arXiv 2401.06121")
def answer_probability(log_probs: Ragged) -> Floats:
    """exp(mean ln p) of the true answer's tokens, end of sequence included: 0..1, lower is more forgotten."""
    return np.array([np.exp(answer.mean()) for answer in log_probs])


@register("metric", source="arXiv 2204.10770 (exact memorisation)")
def exact_memorisation(hits: Ragged, ends: NDArray[np.bool_]) -> Floats:
    """Share of answer tokens that are the most likely ones, end of sequence left out: 0..1, lower is more forgotten."""
    return np.array([words.mean() if len(words) else np.nan for words in _without_end(hits, ends)])


@register("metric", source="arXiv 2012.07805 (extraction), teacher-forced")
def extraction_strength(hits: Ragged, ends: NDArray[np.bool_]) -> Floats:
    """1 − k/T, k the shortest part of the answer after which all the rest is reproduced: 0..1, lower is more forgotten.

    T answer tokens without the end of sequence. 1: the prompt alone gives the whole answer; 0: not even its last token
    is reproduced.
    """
    return np.array([_tail(words) / len(words) if len(words) else np.nan for words in _without_end(hits, ends)])


def _without_end(hits: Ragged, ends: NDArray[np.bool_]) -> list[np.ndarray]:
    """Return each answer's hits without the end-of-sequence token."""
    return [answer[:-1] if end else answer for answer, end in zip(hits, ends, strict=True)]


def _tail(hits: np.ndarray) -> int:
    """Return how many tokens at the end are hit without a gap."""
    misses = np.flatnonzero(~hits)
    return len(hits) - (int(misses[-1]) + 1 if misses.size else 0)
