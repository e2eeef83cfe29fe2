"""Made-up answers of the same form: numbers for numbers, names for names of the same length, the rest as it is."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

from stillknows.types import Example

MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
    *("November", "December"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnprstvwz"
WORD = re.compile(r"\d+|[^\W\d_]+")
YEAR = re.compile(r"(1[0-9]|20)\d\d")
FEW_WORDS = 3  # an answer of so few words may begin with a name


class NameWords:
    """Tells names from other words: capitalised not only where a sentence begins, and never in lower case."""

    def __init__(self, examples: Iterable[Example]) -> None:
        capitalised, lower = set(), set()
        for example in examples:
            for text, opens in ((example.prompt, True), (example.answer, len(example.answer.split()) > FEW_WORDS)):
                words = [match.group() for match in WORD.finditer(text)]
                capitalised |= {word for word in words[opens:] if word[:1].isupper()}
                lower |= {word for word in words if word[:1].islower()}
        self.known = {word for word in capitalised if word.lower() not in lower}

    def __contains__(self, word: str) -> bool:
        return word in self.known

    def frame(self, prompt: str) -> str:
        """Return a question without what it asks about: names and numbers replaced by one "*" each run."""
        words = WORD.sub(lambda m: "*" if m.group() in self or m.group().isdigit() else m.group(), prompt)
        return re.sub(r"\*(\W+\*)+", "*", words)


def made_up_numbers(answer: str, asked: str, choice: random.Random) -> str:
    """Return the answer with other numbers, months and days in the places of its own; as it is where it has none.

    A number keeps its length and a leading zero or the lack of one, a year (1000 to 2099) its century. What the
    question `asked` says already stays.
    """
    said = {*WORD.findall(asked)}

    def other(word: str) -> str:
        for kind in (MONTHS, DAYS):
            if word in kind:
                return choice.choice(kind)
        return _number(word, choice) if word.isdigit() else word

    return WORD.sub(lambda match: match.group() if match.group() in said else other(match.group()), answer)


def made_up_names(answer: str, asked: str, names: NameWords, choice: random.Random) -> str:
    """Return the answer with other names in the places of its own; as it is where it has none.

    Each vowel of a name becomes a vowel, each other letter a consonant, in its case. What the question `asked` says
    already stays.
    """
    said = {*WORD.findall(asked)}

    def other(word: str) -> str:
        return "".join(_letter(letter, choice) for letter in word) if word in names and word not in said else word

    return WORD.sub(lambda match: other(match.group()), answer)


def _number(word: str, choice: random.Random) -> str:
    if YEAR.fullmatch(word):
        return word[:2] + "".join(choice.choice("0123456789") for _ in word[2:])
    first = "0" if word[0] == "0" and len(word) > 1 else choice.choice("123456789" if len(word) > 1 else "0123456789")
    return first + "".join(choice.choice("0123456789") for _ in word[1:])


def _letter(letter: str, choice: random.Random) -> str:
    other = choice.choice(VOWELS if letter.lower() in VOWELS else CONSONANTS)
    return other.upper() if letter.isupper() else other
