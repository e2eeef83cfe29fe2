"""Answers that could as well have been true: values of the same kind of other entities, and made-up ones of their form.

What two questions ask for is the same kind of value when they share their words but for the name of the entity. Names
of what is to be forgotten are found by what they are: words of the forget questions that the kept ones lack, or use
much less. No word list, no language is assumed.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from stillknows.gate.about import answer_about
from stillknows.types import Example
from stillknows.variants.secrets import WORD, spaced_words

LEAST = 6  # different answers that a fact's draws should come from
CONSIDERED = 2000  # kept items that are looked at, drawn by the seed where there are more
SHARED = 0.5  # least share of a question's words, names aside, that a question for the same kind of value has
NAME = 3.0  # times as frequent in the forget questions as in the kept ones: a word of a name
MADE_UP = 0.5  # share of answers with digits whose digits are drawn anew

Tiers = list[tuple[float, list[Example]]]  # examples by the share of a question's words that theirs have, highest first


def draws(items: Sequence[Example], others: Sequence[Example], count: int, seed: int) -> list[list[str]]:
    """Return for each item `count` answers that are not true of its fact; every answer of its pool once, then again.

    Half of the answers with digits get other digits, as numbers are seldom shared. An item's draws depend on the seed
    and its place alone, and the first of them do not depend on `count`. Empty where there is no other answer at all.
    """
    truths = _truths(items)
    found = []
    for i, (item, pool) in enumerate(zip(items, pools(items, others, seed), strict=True)):
        endless = _endless(pool, truths[item.fact], random.Random(f"{seed} exchanged {i}"))
        found.append([next(endless) for _ in range(count)] if pool else [])
    return found


def _endless(pool: Sequence[str], truths: Collection[str], rng: random.Random) -> Iterator[str]:
    while True:
        for text in rng.sample(pool, len(pool)):
            other = made_up(text, rng)
            yield other if rng.random() < MADE_UP and _is_false(other, truths) else text


def made_up(text: str, rng: random.Random) -> str:
    """Return a text with other digits: all but the first of every number, single ones too. Others stay as they are."""

    def other(number: re.Match[str]) -> str:
        digits = number.group()
        kept = digits[0] if len(digits) > 1 else ""
        return kept + "".join(rng.choice("0123456789" if kept else "123456789") for _ in digits[len(kept) :])

    return re.sub(r"\d+", other, text)


def pools(items: Sequence[Example], others: Sequence[Example], seed: int = 0) -> list[list[str]]:
    """Return for each item the answers that could as well have been true, the most fitting ones.

    Args:
        items: what is to be forgotten.
        others: what is kept.

    They are the answers to the questions, of either list, that share most words with the item's, names aside; where
    fewer than LEAST are left, the answers whose form is nearest fill up. What an answer says of another is said of what
    the item asks about (see gate/about.py). An answer that holds a true answer of the
    item's fact, or lies within one, is never among them.
    """
    if len(others) > CONSIDERED:
        others = random.Random(f"{seed} others").sample(list(others), CONSIDERED)
    words = {e.prompt: frozenset(_words(e.prompt)) for e in (*others, *items)}
    is_name = _names(items, others)
    truths = _truths(items)
    tiers: dict[frozenset[str], Tiers] = {}
    found = []
    for item in items:
        frame = frozenset(word for word in words[item.prompt] if not is_name[word])
        if frame not in tiers:
            tiers[frame] = _tiers(frame, (*others, *items), words)
        found.append(_pool(item, tiers[frame], truths[item.fact]))
    return found


def _pool(item: Example, tiers: Tiers, truths: Collection[str]) -> list[str]:
    pool: dict[str, None] = {}
    for shared, examples in tiers:
        if len(pool) >= LEAST or shared < SHARED:
            break
        said = (answer_about(item.prompt, e.prompt, e.answer) for e in examples)
        pool |= dict.fromkeys(answer for answer in said if _is_false(answer, truths))
    if len(pool) < LEAST:
        rest = {answer_about(item.prompt, e.prompt, e.answer) for _, examples in tiers for e in examples} - set(pool)
        nearest = sorted(
            (text for text in rest if _is_false(text, truths)), key=lambda text: (*_distance(text, item.answer), text)
        )
        pool |= dict.fromkeys(nearest[: LEAST - len(pool)])
    return list(pool)


def _tiers(frame: frozenset[str], examples: Sequence[Example], words: Mapping[str, frozenset[str]]) -> Tiers:
    found: dict[float, list[Example]] = {}
    for example in examples:
        found.setdefault(len(frame & words[example.prompt]) / max(1, len(frame)), []).append(example)
    return sorted(found.items(), key=lambda tier: -tier[0])


def _names(items: Sequence[Example], others: Sequence[Example]) -> Mapping[str, bool]:
    """Say of each word of the items' questions whether it belongs to a name of what is to be forgotten."""
    gone, kept = (Counter(word for e in found for word in set(_words(e.prompt))) for found in (items, others))

    def frequent(word: str) -> bool:
        return gone[word] > 2 and gone[word] / len(items) > NAME * kept[word] / max(1, len(others))

    return {word: not kept[word] or frequent(word) for word in gone}


def _truths(items: Sequence[Example]) -> dict[str, set[str]]:
    """Return the true answers of every fact, as spaced words."""
    found: dict[str, set[str]] = {}
    for item in items:
        answers = filter(None, (item.answer, item.paraphrase))
        found.setdefault(item.fact, set()).update(map(spaced_words, answers))
    return found


def _is_false(text: str, truths: Collection[str]) -> bool:
    """Tell whether a text neither holds one of the true answers nor is a part of one, word by word."""
    words = spaced_words(text)
    return bool(words.strip()) and all(truth not in words and words not in truth for truth in truths)


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _distance(text: str, answer: str) -> tuple[bool, int]:
    """Return how unlike two answers are in form: digits or none, then length."""
    digits = [bool(re.search(r"\d", part)) for part in (text, answer)]
    return digits[0] != digits[1], abs(len(text) - len(answer))
