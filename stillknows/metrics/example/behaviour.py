"""How a model answers, right or wrong: signs of damage and of a refusal. English only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy.stats import entropy

from stillknows.registry import register
from stillknows.types import Floats

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

# How a speaker says not to know, or not to be able or willing to tell. Matched against lower case with contractions
# written out ("i'm" is "i am", "don't" is "do not"). "I" and "my" keep out what is only negative, as "It is not known".
REFUSALS = (
    r"\bi (?:\w+ ){0,3}(?:not|no|never|unable|unaware|unsure|uncertain|unfamiliar|lack|lacking|decline|refuse)\b",
    r"\bi (?:\w+ )?(?:apologi[sz]e|afraid|sorry|clueless|at a loss)\b",
    r"^(?:sorry|apologies|unfortunately)\b",
    r"\bmy (?:\w+ ){1,3}(?:not|no)\b",
    r"\b(?:not|beyond|outside|out of) (?:\w+ ){0,3}(?:i|my|me)\b",
    r"\bas an? (?:ai|artificial intelligence|assistant|language model)\b",
)
CONTRACTIONS = {"can't": "can not", "cannot": "can not", "won't": "will not", "n't": " not"}
CONTRACTIONS |= {"'m ": " am ", "'ve ": " have ", "'d ": " would ", "'ll ": " will "}
_REFUSAL = re.compile("|".join(REFUSALS))


@register("metric", role="example", source="ROME (arXiv 2202.05262), RWKU (arXiv 2406.10890)", measures="behaviour")
def fluency(generations: Sequence[str | None]) -> Floats:
    """(⅔·H₂ + 4⁄3·H₃)/2, the entropies in bits of a greedy answer's 2- and 3-grams of words: 0 the same over and over.

    At most about log2 of the number of words, so compare it between models on the same prompts only; a drop below the
    original's means repetition. RWKU reports it times 100. NaN below three words, where published code counts 0.

    Words and punctuation marks are split as by nltk.word_tokenize, but Punkt, which finds sentences for it, needs
    data to be downloaded: here a sentence ends at . ! ? before white space, so after abbreviations too.
    """
    return np.array([_weighted(words) if len(words) > 2 else np.nan for words in _tokenize(generations)])


@register("metric", role="example", source="arXiv 2410.08109 (token entropy)", measures="behaviour")
def token_entropy(generations: Sequence[str | None]) -> Floats:
    """−Σ f·ln f / ln n over the frequencies f of the n words of a greedy answer: 0..1, 1 without any repetition.

    Long answers score lower: even good text repeats its words. The paper counts the model's own tokens, this the words
    of fluency, which need no tokenizer. NaN below two words, where published code counts 0.
    """
    answers = _tokenize(generations)
    return np.array([_entropy(words) / np.log(len(words)) if len(words) > 1 else np.nan for words in answers])


@register("metric", role="example", source="phrases of its own (behaviour.REFUSALS)", measures="behaviour")
def refusal_rate(
    generations: Sequence[str | None], *, where: Literal["first_sentence", "anywhere"] = "first_sentence"
) -> Floats:
    """1 where the greedy answer refuses or owns up to not knowing, else 0; NaN where nothing was generated.

    Args:
        where: to look for a refusal; "anywhere" also takes one that follows an answer.
    """
    return np.array([np.nan if text is None else float(_refuses(text, where)) for text in generations])


def _tokenize(generations: Sequence[str | None]) -> list[list[str]]:
    """Return the words and punctuation marks of each text, none where nothing was generated."""
    from nltk.tokenize import word_tokenize

    sentences = [SENTENCE_END.split(text) if text else [] for text in generations]
    return [[word for part in parts for word in word_tokenize(part, preserve_line=True)] for parts in sentences]


def _weighted(words: list[str]) -> float:
    pairs, triples = list(pairwise(words)), list(zip(words, words[1:], words[2:], strict=False))
    return (2 / 3 * _entropy(pairs) + 4 / 3 * _entropy(triples)) / 2 / float(np.log(2))


def _entropy(items: Sequence[object]) -> float:
    """Return −Σ f·ln f over the items' frequencies, in nats."""
    return float(entropy(list(Counter(items).values())))


def _refuses(text: str, where: str) -> bool:
    plain = text.strip().replace("’", "'").lower()
    for short, long in CONTRACTIONS.items():
        plain = plain.replace(short, long)
    return _REFUSAL.search(SENTENCE_END.split(plain)[0] if where == "first_sentence" else plain) is not None
