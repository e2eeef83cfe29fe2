"""What two questions of a kind differ in, and the answer to one as it would be said of what the other asks about.

"What is the capital of Italy?" and "What is the capital of Japan?" differ in a name. "The capital of Japan is Tokyo",
said of Italy, is "The capital of Italy is Tokyo": an answer that could as well have been true. No word list, no
language is assumed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SHARED = 0.5  # least share of a question's words that a question of its kind has


def answer_about(prompt: str, other: str, answer: str) -> str:
    """Return the answer to another question with the name that this one asks about in the place of its own.

    As it is where the two share too little to be of a kind, or the answer does not say the name.
    """
    name, theirs = difference(prompt, other)
    return place_of(theirs).sub(lambda _: name, answer) if name and theirs else answer


def place_of(name: str) -> re.Pattern[str]:
    """Return the pattern of a name as whole words."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")


def difference(first: str, second: str) -> tuple[str, str]:
    """Return where two questions differ, as words; "" where they share too little to be of one kind."""
    parts = [re.findall(r"\w+|\W+", text) for text in (first, second)]
    before = _alike(*parts)
    rest = [part[before:] for part in parts]
    after = _alike(*(part[::-1] for part in rest))
    middles = ["".join(part[: len(part) - after]).strip() for part in rest]
    words = len(re.findall(r"\w+", first))
    if words - len(re.findall(r"\w+", middles[0])) < SHARED * words:
        return "", ""
    return middles[0], middles[1]


def _alike(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many parts two texts begin with alike."""
    return next(
        (k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
