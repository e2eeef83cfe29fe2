"""One grammar for all that is named in a text: `rtn(bits=3, group=64)`, chains with "+", lists with commas.

    list  = chain {"," chain}
    chain = call {"+" call}
    call  = name | name "(" [given {"," given}] ")" | name ":" given {(":" | ",") given}
    given = [option "="] value
    value = a text in double quotes, as in JSON | any text up to the next separator

Brackets that are closed protect the separators within them, so that `ste(formats=[nf4, rtn(bits=3, group=64)])` is one
call. Without brackets, ":" and "," separate options only before an `option=`: values may hold both, as paths do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from stillknows.errors import UserError

NAME = r"[^\W\d]\w*"
OPTION = rf"{NAME}="
LIST = re.compile(rf",(?!\s*{OPTION})")  # in rtn:bits=3,group=64 the comma separates options
ALTERNATIVES = re.compile(rf"\||,(?!\s*{OPTION})")
CHAIN = re.compile(r"\+")
BARE = re.compile(rf"[:,](?=\s*{OPTION})")
BRACKETED = re.compile(r",")
CLOSING = {")": "(", "]": "["}

Specs: TypeAlias = str | Sequence[str]  # a list in the grammar, or its parts one by one


@dataclass(frozen=True)
class Call:
    """A name and what is given to it: options with their values, "" in the place of an option that is not named."""

    name: str
    given: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """Write it in the one canonical way: with ":" where that can be read back anywhere, else with brackets."""
        text = ":".join([self.name, *(f"{key}={value}" if key else value for key, value in self.given)])
        return (
            text if all(_is_plain(value) for _, value in self.given) and _reads_back(text, self) else self.bracketed()
        )

    def bracketed(self) -> str:
        """Write it with brackets, as a part of something else."""
        return (
            f"{self.name}({', '.join(_written(key, value) for key, value in self.given)})" if self.given else self.name
        )

    def nested(self) -> str:
        """Write it as a part of an option's value: with brackets where options are named."""
        text = str(self)
        is_short = not any(key for key, _ in self.given) and alternatives(text) == [text]
        return text if is_short else self.bracketed()


def parse(text: str) -> Call:
    """Take a call apart. Raises UserError for brackets that are not closed, and for options that belong to nothing."""
    text = text.strip(" ")
    opened = re.match(rf"({NAME})\(", text)
    if opened:
        name = opened[1]
        if not _is_closed(text, len(name)):
            raise UserError(f"{text}: the bracket after {name} does not close at the end", f"{name}(option=value, …)")
        inside = text[len(name) + 1 : -1]
        return Call(name, tuple(_given(part.strip()) for part in split(inside, BRACKETED) if inside.strip()))
    name, _, rest = text.partition(":")
    lost = re.search(rf",\s*({OPTION})", name)
    if lost:
        owner, options = name[: lost.start()], text[lost.start(1) :]
        raise UserError(f"{text}: {options} belongs to nothing", f"write {owner}({options})")
    return Call(name, tuple(_given(part.lstrip(" ")) for part in split(rest, BARE) if rest))


def listed(text: str) -> list[str]:
    """Return the parts of a list, with or without square brackets around it."""
    return [part.strip() for part in split(_inner(text), LIST)]


def alternatives(text: str) -> list[str]:
    """Return the parts of a list in square brackets, or of one that is separated by "|" or commas."""
    return [part.strip() for part in split(_inner(text), ALTERNATIVES)]


def chained(text: str) -> list[str]:
    """Return the parts of a chain."""
    return [part.strip() for part in split(text, CHAIN)]


def spelled(given: Specs) -> tuple[str, ...]:
    """Return the parts of a list, each in its canonical spelling, once; of "" none."""
    parts = given if not isinstance(given, str) else listed(given) if given.strip() else []
    return tuple(dict.fromkeys("+".join(str(parse(call)) for call in chained(part)) for part in parts))


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Cut a text at the separators that neither brackets nor quotes protect."""
    protected, start = _protected(text), 0
    parts: list[str] = []
    for found in separator.finditer(text):
        if not protected[found.start()]:
            parts.append(text[start : found.start()])
            start = found.end()
    return [*parts, text[start:]]


def _protected(text: str) -> list[bool]:
    """Tell of each character whether it stands within quotes, or brackets that are closed; these count as within."""
    protected, i = [False] * len(text), 0
    opened: list[int] = []
    while i < len(text):
        end = _quoted(text, i)
        if end:
            protected[i:end] = [True] * (end - i)
            i = end
            continue
        if text[i] in CLOSING.values():
            opened.append(i)
        elif text[i] in CLOSING and opened and text[opened[-1]] == CLOSING[text[i]]:
            start = opened.pop()
            protected[start : i + 1] = [True] * (i + 1 - start)
        i += 1
    return protected


def _quoted(text: str, start: int) -> int:
    """Return where a text in quotes that starts here ends; 0 where none does. Quotes within a word are plain."""
    if text[start] != '"' or text[:start].rstrip(" ")[-1:] not in ("", *"=([,:+|"):
        return 0
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except json.JSONDecodeError:
        return 0


def _is_closed(text: str, start: int) -> bool:
    """Tell whether the bracket at `start` is closed by the last character."""
    return text[-1] == ")" and all(_protected(text)[start:]) and not _protected(text[:-1])[start]


def _inner(text: str) -> str:
    text = text.strip()
    is_list = text.startswith("[") and text.endswith("]") and not _protected(text[:-1])[0]
    return text[1:-1] if is_list else text


def _given(text: str) -> tuple[str, str]:
    named = re.match(OPTION, text)
    key, value = (named[0][:-1], text[named.end() :]) if named else ("", text)
    return key, json.loads(value) if value and _quoted(value, 0) == len(value) else value


def _is_plain(value: str) -> bool:
    """Tell whether a value can stand beside others without changing how they are read."""
    protected = _protected(value)
    brackets = all(protected[i] for i, character in enumerate(value) if character in "()[]")
    return bool(value) and value == value.strip() and '"' not in value and brackets


def _reads_back(text: str, call: Call) -> bool:
    try:
        return parse(text) == call and listed(text) == [text] and chained(text) == [text]
    except UserError:
        return False


def _written(key: str, value: str) -> str:
    plain = f"{key}={value}" if key else value
    if _is_plain(value) and split(plain, BRACKETED) == [plain] and _given(plain) == (key, value):
        return plain
    return (f"{key}=" if key else "") + json.dumps(value, ensure_ascii=False)
