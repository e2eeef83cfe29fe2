"""Texts word for word: which hold an answer, and which one that is to be forgotten: no attack may be made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from stillknows.types import Benchmark, Example

WORD = re.compile(r"\w+")


def spaced_words(text: str) -> str:
    """Return a text's words with single spaces around them, so that words are found whole."""
    return f" {' '.join(WORD.findall(text.casefold())) or text.strip()} "


def secrets(benchmark: Benchmark) -> set[str]:
    """Return the answers that are to be forgotten."""
    return {e.answer for split in benchmark.splits if split.role == "forget" for e in split.examples}


def holds(text: str, answer: str) -> bool:
    """Tell whether a text holds an answer, word for word; case and punctuation apart."""
    return spaced_words(answer) in spaced_words(text)


def harmless(examples: Iterable[Example], benchmark: Benchmark) -> list[Example]:
    """Return the examples that hold none of the answers that are to be forgotten."""
    hidden = set(map(spaced_words, secrets(benchmark)))
    texts = ((e, spaced_words(f"{e.prompt} {e.answer}")) for e in examples)
    return [e for e, text in texts if not any(secret in text for secret in hidden)]
