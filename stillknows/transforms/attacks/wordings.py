"""What attacks on questions share: wordings from templates, and what else the benchmark tells."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType

from stillknows.errors import UserError
from stillknows.gate.candidates import placebos
from stillknows.types import CHAT, PLACE, Benchmark, Edge, Example, Split
from stillknows.variants.frames import without_mark
from stillknows.variants.secrets import harmless

QUESTION, BARE = "{question}", "{bare}"  # in a template: the item's own question, and without its question mark
FEW = 3  # other answers that are looked for at least, so that the seed can choose


def reworded(split: Split, texts: Mapping[str, str], count: int, *, whole: bool = False) -> dict[str, Split]:
    """Return a split in the first `count` of these wordings; items without a question stay as they are.

    Args:
        texts: templates by name, in which QUESTION and BARE are replaced.
        whole: the text is all that is read, without a template around it; in a chat it is the user's turn.
    """
    return {name: asked(split, text, whole=whole) for name, text in islice(texts.items(), count)}


def asked(split: Split, text: str, *, whole: bool = False) -> Split:
    """Return a split with every question in this template; see `reworded`."""
    examples = tuple(
        replace(e, prompt=text.replace(QUESTION, e.prompt).replace(BARE, without_mark(e.prompt))) if e.prompt else e
        for e in split.examples
    )
    return alone(split, examples) if whole else replace(split, examples=examples)


def alone(split: Split, examples: Sequence[Example]) -> Split:
    """Return a split of these examples, whose prompts are all that is read; in a chat they are the user's turns."""
    return replace(split, examples=tuple(examples), template=split.template if split.template == CHAT else PLACE)


def in_chat(split: Split, template: str) -> Split:
    """Return a split that says itself whether it is asked in a chat."""
    return replace(split, template=CHAT) if template == CHAT else split


def kept_questions(benchmark: Benchmark, count: int, seed: int, who: str) -> list[Example]:
    """Return questions of the splits to retain, in a random order, that hold none of the answers to be forgotten.

    Raises UserError, in the name of an attack, where there are fewer.
    """
    found = _kept(benchmark)
    if len(found) < count:
        raise UserError(
            f"{who} needs {count} questions to retain that hold no answer to be forgotten, and there are {len(found)}",
            "add some to the retain split, or ask for fewer",
        )
    return random.Random(seed).sample(found, count)


@functools.lru_cache(maxsize=4)
def _kept(benchmark: Benchmark) -> tuple[Example, ...]:
    """Return one question of each fact to retain that holds no answer to be forgotten."""
    kept = {e.fact: e for split in benchmark.splits if split.role == "retain" for e in split.examples if e.prompt}
    return tuple(harmless(kept.values(), benchmark))


def other_answers(benchmark: Benchmark, count: int, seed: int) -> Callable[[Example], list[str]]:
    """Return f(item): up to `count` answers that could have been true of it, in a random order, and never its own.

    They are true answers to other questions of the kind, where there are so many: made-up ones would give themselves
    away.
    """
    answers = _answers(benchmark, max(count, FEW))

    def others(e: Example) -> list[str]:
        found = [answer for answer in answers.get(e.fact, ()) if answer != e.answer] if e.prompt else []
        return random.Random(f"{seed} {e.fact} {e.answer}").sample(found, min(count, len(found)))

    return others


@functools.lru_cache(maxsize=4)
def _answers(benchmark: Benchmark, count: int) -> Mapping[str, tuple[str, ...]]:
    """Return by fact its true answers and placebos: a placebo that stands for the truth has the truth among these."""
    found, answers = placebos(benchmark, count=count), dict[str, dict[str, None]]()
    for split in benchmark.splits:
        for e in split.examples if split.role == "forget" else ():
            answers.setdefault(e.fact, {}).update(dict.fromkeys((e.answer, *found.of(e))))
    return MappingProxyType({fact: tuple(names) for fact, names in answers.items()})


def edges(benchmark: Benchmark, who: str) -> dict[str, Edge]:
    """Return what the benchmark knows of its facts, by fact. Raises UserError where it knows nothing of them."""
    if not benchmark.graph:
        raise UserError(
            f"{who} needs to know of which entities the facts are, and {benchmark.spec} does not say",
            "leave it out; the benchmark world knows",
        )
    return {edge.fact: edge for edge in benchmark.graph}


def statements(benchmark: Benchmark) -> Callable[[Example], str]:
    """Return f(item): the beginning of a sentence that its answer ends, "The birthplace of Ada is"."""
    graph = {edge.fact: edge for edge in benchmark.graph}

    def begun(e: Example) -> str:
        edge = graph.get(e.fact)
        if edge:
            return f"The {edge.relation} of {edge.entity} is"
        of = re.fullmatch(r"(?:what|who|which|where) (is|was|are|were) (the .+)", without_mark(e.prompt), re.IGNORECASE)
        return f"T{of[2][1:]} {of[1]}" if of else f'The answer to the question "{e.prompt}" is'

    return begun
