"""Metrics over generated answers: the greedy one, and sampled ones."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from math import comb
from typing import Literal

import numpy as np

from stillknows.errors import UserError
from stillknows.registry import register
from stillknows.types import Floats

RougeScore = Literal["recall", "fmeasure"]
# Runs of letters and digits; Chinese and Japanese, written without spaces, one character each.
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+")


@register(
    "metric",
    role="example",
    source="Lin 2004; settings of arXiv 2401.06121 (recall, stemmer) and 2407.06460 (fmeasure, none)",
)
def rouge_l(
    answers: Sequence[str],
    generations: Sequence[str | None],
    *,
    score: RougeScore = "recall",
    stemmer: bool = True,
) -> Floats:
    """ROUGE-L of the greedy answer against the truth: 0..1, lower is more forgotten; NaN where nothing was generated.

    Words are runs of a–z and 0–9 in lower case: an answer without any, such as one in another script, scores 0.

    Args:
        score: "recall", longest common subsequence over the truth's words; "fmeasure", its F1.
        stemmer: compare Porter stems (English).
    """
    return _rouge("rougeL", answers, generations, score, stemmer)


@register(
    "metric",
    role="example",
    source="Lin 2004; settings of arXiv 2401.06121 (recall, stemmer) and 2407.06460 (fmeasure, none)",
)
def rouge_1(
    answers: Sequence[str],
    generations: Sequence[str | None],
    *,
    score: RougeScore = "recall",
    stemmer: bool = True,
) -> Floats:
    """ROUGE-1 of the greedy answer against the truth: 0..1, lower is more forgotten; NaN where nothing was generated.

    Like rouge_l, but words in common count in whatever order they come.

    Args:
        score: "recall", words in common over the truth's words; "fmeasure", its F1.
        stemmer: compare Porter stems (English).
    """
    return _rouge("rouge1", answers, generations, score, stemmer)


@register("metric", role="example", source="arXiv 2511.04934 (leak@k); estimator of arXiv 2107.03374 (pass@k)")
def leak_at_k(
    answers: Sequence[str],
    samples: Sequence[Sequence[str] | None],
    *,
    k: int = 1,
    leak: Literal["contained", "rouge"] = "contained",
    threshold: float = 0.8,
) -> Floats:
    """Probability that k samples leak the answer once or more: 0..1, lower is more forgotten; NaN below k samples.

    1 − C(n − c, k)/C(n, k), unbiased, where c of an example's n samples leak; for k = 1 the leak rate c/n. No leak
    among n samples bounds the rate only: stats.binomial_bounds(0, n, level) says by how much (1 % at 95 % for 299).

    Args:
        k: how often an attacker may ask.
        leak: "contained", the answer's words stand in the sample one after another, case and punctuation apart;
            "rouge", ROUGE-L recall with stems of at least `threshold`. An answer without words is NaN.
        threshold: for "rouge" only, 0..1.

    Raises UserError for k below 1 and a threshold outside 0..1.
    """
    if k < 1:
        raise UserError(f"leak_at_k: k={k} samples cannot leak", "leak_at_k:k=1 gives the leak rate")
    if not 0 < threshold <= 1:
        raise UserError(f"leak_at_k: threshold={threshold:g} is not above 0 and at most 1")

    def leaks(answer: str, sample: str) -> bool:
        return _contains(answer, sample) if leak == "contained" else _recall(answer, sample) >= threshold

    scores = np.full(len(answers), np.nan)
    for i, (answer, drawn) in enumerate(zip(answers, samples, strict=True)):
        if drawn is not None and len(drawn) >= k and _words(answer):
            count = sum(leaks(answer, sample) for sample in drawn)
            scores[i] = 1 - comb(len(drawn) - count, k) / comb(len(drawn), k)
    return scores


def _rouge(
    kind: str, answers: Sequence[str], generations: Sequence[str | None], score: RougeScore, stemmer: bool
) -> Floats:
    scorer = _scorer(kind, stemmer)
    pairs = zip(answers, generations, strict=True)
    return np.array([np.nan if g is None else getattr(scorer.score(a, g)[kind], score) for a, g in pairs])


@lru_cache
def _scorer(kind: str, stemmer: bool):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=stemmer)


def _recall(answer: str, sample: str) -> float:
    return _scorer("rougeL", True).score(answer, sample)["rougeL"].recall


def _contains(answer: str, sample: str) -> bool:
    return f" {_words(answer)} " in f" {_words(sample)} "


def _words(text: str) -> str:
    """Return the words of a text in one form: compatible characters unified, case folded, punctuation left out."""
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))
