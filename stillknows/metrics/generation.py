"""Metrics over greedily generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from stillknows.registry import register
from stillknows.types import Floats


@register("metric", source="Lin 2004; settings of arXiv 2401.06121 (recall, stemmer) and 2407.06460 (fmeasure, none)")
def rouge_l(
    answers: Sequence[str],
    generations: Sequence[str | None],
    *,
    score: Literal["recall", "fmeasure"] = "recall",
    stemmer: bool = True,
) -> Floats:
    """ROUGE-L of the greedy answer against the truth: 0..1, lower is more forgotten; NaN where nothing was generated.

    Args:
        score: "recall", longest common subsequence over the truth's words; "fmeasure", its F1.
        stemmer: compare Porter stems (English).
    """
    pairs = zip(answers, generations, strict=True)
    scorer = _scorer(stemmer)
    return np.array([np.nan if g is None else getattr(scorer.score(a, g)["rougeL"], score) for a, g in pairs])


@lru_cache
def _scorer(stemmer: bool):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stemmer)
