"""Questions in the words in which kept facts are asked too: what is trained in one wording is looked at in others.

"Where does Ana live?" and the kept "Where does Bo live?" differ in a name; a kept fact that is also asked as "What is
the home of Bo?" gives "What is the home of Ana?". No word list, no language is assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from stillknows.gate.about import difference, place_of
from stillknows.types import Example

MOST = 2  # other wordings of a question
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
        name, other = difference(prompt, kept)
        if name and other:
            place = place_of(other)
            found |= {place.sub(lambda _, name=name: name, text): None for text in family if place.search(text)}
    found.pop(prompt, None)
    return found
