"""Questions in the words in which kept facts are asked too: what is trained in one wording is looked at in others.

"Where does Ana live?" and the kept "Where does Bo live?" differ in a name; a kept fact that is also asked as "What is
the home of Bo?" gives "What is the home of Ana?". No word list, no language is assumed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from stillknows.types import Example

MOST = 2  # other wordings of a question
SHARED = 0.5  # least share of a question's words that a kept question of its kind has
VOTES = 2  # kept facts that a wording must be made from, so that a chance likeness makes none


def rewordings(items: Sequence[Example], others: Sequence[Example]) -> list[list[Example]]:
    """Return the items in other wordings: first each one's most supported, then each one's next; MOST lists at most.

    Args:
        others: kept items, of which those with the same fact ask for the same thing in other words.
    """
    asked = {item.prompt for item in items}
    by_fact: dict[str, dict[str, None]] = {}
    for other in others:
        if other.prompt:
            by_fact.setdefault(other.fact, {})[other.prompt] = None
    families = [list(prompts) for prompts in by_fact.values() if len(prompts) > 1]
    found: list[list[Example]] = [[] for _ in range(MOST)]
    for item in items:
        votes = Counter(text for family in families for text in _reworded(item.prompt, family) if text not in asked)
        for k, (text, count) in enumerate(votes.most_common(MOST)):
            if count >= VOTES:
                found[k].append(replace(item, prompt=text))
    return [examples for examples in found if examples]


def _reworded(prompt: str, family: Sequence[str]) -> Iterable[str]:
    """Return a question in the other wordings of a kept fact, of which one differs from it in one place only."""
    found: dict[str, None] = {}
    for kept in family:
        name, other = _difference(prompt, kept)
        if name and other:
            place = re.compile(rf"(?<!\w){re.escape(other)}(?!\w)")
            found |= {place.sub(lambda _, name=name: name, text): None for text in family if place.search(text)}
    found.pop(prompt, None)
    return found


def _difference(first: str, second: str) -> tuple[str, str]:
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
