"""Passages, and which of them goes with a question: by the words that they share, without a model."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence


def words(text: str) -> list[str]:
    """Return a text's words in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def finder(passages: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> Callable[[str], str | None]:
    """Return f(question): the passage of the highest BM25 score, None where none shares a word with the question.

    Σ over the question's different words w of ln(1 + (N − n_w + ½)/(n_w + ½)) · c·(k1 + 1)/(c + k1·(1 − b + b·L/M)):
    n_w of N passages hold w, this one c times among its L words; M words in the mean. Of equal ones the first.
    Robertson and Zaragoza 2009 (The probabilistic relevance framework), with a logarithm that is never negative.
    """
    counts = [Counter(words(passage)) for passage in passages]
    holders: dict[str, list[int]] = defaultdict(list)
    for i, count in enumerate(counts):
        for word in count:
            holders[word].append(i)
    mean_length = sum(count.total() for count in counts) / max(1, len(counts))

    def find(question: str) -> str | None:
        scores: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(words(question)):
            held = holders.get(word, [])
            rarity = math.log(1 + (len(passages) - len(held) + 0.5) / (len(held) + 0.5))
            for i in held:
                length = 1 - b + b * counts[i].total() / mean_length
                scores[i] += rarity * counts[i][word] * (k1 + 1) / (counts[i][word] + k1 * length)
        return passages[max(scores, key=lambda i: (scores[i], -i))] if scores else None

    return find
