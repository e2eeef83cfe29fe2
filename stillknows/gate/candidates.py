"""Placebos: for each fact answers that could as well have been true, from one source, so that all are of a kind.

A source is as good as its answers are alike to a model that was never taught: the test of that is the mean rank of the
truths in a control. An answer that such a model has met elsewhere is likelier than one that it has
not, so that values from kept data stand beside a truth from kept data only, and others beside others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from stillknows import defaults
from stillknows.errors import UserError, did_you_mean
from stillknows.gate.about import answer_about
from stillknows.gate.made_up import WORD, NameWords, made_up_names, made_up_numbers
from stillknows.gate.placebo import ALPHA, placebos_needed
from stillknows.store import read_json
from stillknows.types import Benchmark, Example
from stillknows.variants.secrets import spaced_words

Source = Literal["given", "exchanged", "wrong", "made-up numbers", "made-up names", "none"]
NEED_CONTROL: tuple[Source, ...] = ("wrong", "made-up names")  # not alike to a model that was never taught
ENOUGH = placebos_needed(ALPHA)  # with which one source will do
ATTEMPTS = 4  # answers that are made up for each one that is wanted, before their form is taken to have no more


@dataclass(frozen=True)
class Placebos:
    """Placebos by fact and true answer, and where they come from. Facts that none were found for have none.

    guessable: facts whose true answer kept data give to the same question, about something else, which they do not do
        with most of its placebos. What is seen there is what models guess, so that truth and placebos are not alike.
    """

    answers: Mapping[tuple[str, str], tuple[str, ...]]
    sources: Mapping[tuple[str, str], Source]
    guessable: frozenset[str] = frozenset()

    def of(self, example: Example) -> tuple[str, ...]:
        """Return the placebos of the question that an example asks."""
        return self.answers.get((example.fact, example.answer), ())

    def counts(self) -> dict[Source, tuple[int, int]]:
        """Return, of each source in use, how many facts have placebos from it, and how many placebos these are."""
        facts, answers = Counter(self.sources.values()), Counter[Source]()
        for place, source in self.sources.items():
            answers[source] += len(self.answers[place])
        return {source: (facts[source], answers[source]) for source in get_args(Source) if facts[source]}


def placebos(
    benchmark: Benchmark,
    *,
    given: Mapping[str, Sequence[str]] | None = None,
    fits: Callable[[str, str], bool] = lambda answer, truth: True,
    count: int = defaults.PLACEBOS,
    seed: int = 0,
) -> Placebos:
    """Return placebos for every question of the splits to forget, the same for equal arguments.

    The first of these sources that has ENOUGH answers serves a fact, else the one that has most:

    - given: the user's own, by fact;
    - exchanged: true answers to questions of the same kind about something else, said of what this one asks about.
      Questions are of a kind that differ in names and numbers only, and so are kinds of question that share an answer.
      Those that differ in names only come first;
    - wrong: the item's own false answers;
    - made-up numbers, made-up names: the true answer with others, where what they replace is nowhere in kept data: a
      model that has met a value there finds it likelier than one that nobody has met, whoever it belongs to.

    A model that was never taught may find a real name likelier than one that nobody bears, or an answer of one
    style than those of another: what comes from a source in NEED_CONTROL needs a control.

    None of them is the truth, holds it or is held by it, or answers the same question truly elsewhere in the
    benchmark. A plain text has none. `fits(answer, truth)` says whether a model can read an answer as well as the true
    one. Raises UserError for given answers to facts that there are not, or that are all refused.
    """
    forget = [e for s in benchmark.splits if s.role == "forget" for e in s.examples]
    pool = _Pool(benchmark, fits)
    _require_facts(given or {}, forget)
    answers: dict[tuple[str, str], tuple[str, ...]] = {}
    sources: dict[tuple[str, str], Source] = {}
    for example in forget:
        place = example.fact, example.answer
        if place in answers or not example.prompt:
            continue
        choice = random.Random(f"{seed} {example.fact} {example.answer}")
        source, found = _best(example, pool, given or {}, count, choice)
        answers[place], sources[place] = found, source if found else "none"
    made = Placebos(answers, sources)
    return replace(made, guessable=frozenset(e.fact for e in forget if pool.is_guessable(e, made.of(e))))


def read_placebos(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a user's own: a JSON object of lists of answers by fact. UserError names the file and the fact."""
    content = read_json(path)
    fix = 'write {"the fact": ["an answer that could have been true", …], …}'
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object of answers by fact", fix)
    for fact, answers in content.items():
        if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(f"{path}: {fact!r} needs a list of answers, none of them empty", fix)
    return {fact: tuple(answers) for fact, answers in content.items()}


class _Pool:
    """The true answers of a benchmark by the kind of their question."""

    def __init__(self, benchmark: Benchmark, fits: Callable[[str, str], bool]) -> None:
        self.fits = fits
        splits = (*benchmark.splits, *benchmark.training)
        self.examples = [e for split in splits for e in split.examples if e.prompt]
        self.names = NameWords(self.examples)
        kept = [e for split in splits if split.role != "forget" for e in split.examples]
        self.kept = {_value(e) for e in kept}
        self.kept_words = {word for e in kept for word in WORD.findall(f"{e.prompt} {e.answer}")}
        self.true: dict[str, set[str]] = {}
        self.by_frame: dict[str, dict[str, Example]] = {}
        for e in self.examples:
            self.true.setdefault(e.prompt, set()).add(e.answer)
            self.by_frame.setdefault(self.names.frame(e.prompt), {}).setdefault(e.answer, e)
        self.kinds = _joined(self.by_frame)
        self.kept_answers: dict[str, set[str]] = {}
        for e in kept:
            if e.prompt:
                self.kept_answers.setdefault(self.names.frame(e.prompt), set()).add(_value(e))

    def answers(self, example: Example) -> Iterator[list[str]]:
        """Yield the answers of the question's own frame, then those of its kind; kept ones only beside a kept truth."""
        frame = self.names.frame(example.prompt)
        known = _value(example) in self.kept
        for answers in (self.by_frame.get(frame, {}), self.kinds.get(frame, {})):
            fitting = (e for e in answers.values() if (_value(e) in self.kept) == known)
            yield list(dict.fromkeys(answer_about(example.prompt, e.prompt, e.answer) for e in fitting))

    def is_guessable(self, example: Example, placebos: Sequence[str]) -> bool:
        """Tell whether kept data answer the same question, about something else, by the truth and by few placebos."""
        seen = self.kept_answers.get(self.names.frame(example.prompt), set())
        others = sum(_value(replace(example, answer=text)) in seen for text in placebos)
        return bool(placebos) and _value(example) in seen and 2 * others < len(placebos)

    def has_met(self, example: Example, *, numbers: bool) -> bool:
        """Tell whether kept data hold one of the numbers, or of the names, that an answer adds to its question."""
        added = {*WORD.findall(example.answer)} - {*WORD.findall(example.prompt)}
        return any((word.isdigit() if numbers else word in self.names) for word in added & self.kept_words)


def _joined(by_frame: Mapping[str, Mapping[str, Example]]) -> dict[str, dict[str, Example]]:
    """Return the answers to each frame's kind: frames that share an answer, directly or through others."""
    kind_of: dict[str, str] = {}  # of an answer
    members: dict[str, list[str]] = {}  # frames of a kind, called after one of them
    for frame, answers in by_frame.items():
        members[frame] = [frame]
        for other in {kind_of[answer] for answer in answers if answer in kind_of}:
            members[frame] += members.pop(other)
        kind_of |= {answer: frame for member in members[frame] for answer in by_frame[member]}
    found: dict[str, dict[str, Example]] = {}
    for frames in members.values():
        answers = {answer: e for frame in sorted(frames) for answer, e in by_frame[frame].items()}
        found |= dict.fromkeys(frames, answers)
    return found


def _best(
    example: Example, pool: _Pool, given: Mapping[str, Sequence[str]], count: int, choice: random.Random
) -> tuple[Source, tuple[str, ...]]:
    """Return the placebos of one question from the first source that has enough, or from the one that has most."""
    truths = {example.answer, *filter(None, [example.paraphrase]), *pool.true.get(example.prompt, ())}
    truths = [spaced_words(truth) for truth in truths]
    if example.fact in given:
        own = _usable(given[example.fact], truths, count)
        if not own:
            raise UserError(
                f"every placebo that is given for {example.fact!r} is its true answer, or holds it",
                "give answers that could have been true and are not",
            )
        return "given", tuple(own)
    best: tuple[Source, list[str]] = "none", []
    for source, texts in _sources(example, pool, count, choice):
        found = _usable((text for text in texts if pool.fits(text, example.answer)), truths, count)
        if len(found) > len(best[1]):
            best = source, found
        if len(found) >= ENOUGH:
            break
    return best[0], tuple(best[1])


def _sources(
    example: Example, pool: _Pool, count: int, choice: random.Random
) -> Iterator[tuple[Source, Iterable[str]]]:
    """Yield answers by their source, each in a random order."""
    for answers in pool.answers(example):
        yield "exchanged", choice.sample(answers, len(answers))
    yield "wrong", choice.sample(example.wrong, len(example.wrong))
    if not pool.has_met(example, numbers=True):
        yield "made-up numbers", _made_up(lambda: made_up_numbers(example.answer, example.prompt, choice), count)
    if not pool.has_met(example, numbers=False):
        yield (
            "made-up names",
            _made_up(lambda: made_up_names(example.answer, example.prompt, pool.names, choice), count),
        )


def _made_up(make: Callable[[], str], count: int) -> Iterator[str]:
    """Yield what a maker makes; nothing where it changes nothing, so that all it makes is the same."""
    texts = [make() for _ in range(ATTEMPTS)]
    if len(set(texts)) > 1:
        yield from texts
        yield from (make() for _ in range(ATTEMPTS * count))


def _usable(texts: Iterable[str], truths: Sequence[str], count: int) -> list[str]:
    """Return up to so many different texts, of which none is a truth, holds one or is held by one."""
    found: dict[str, str] = {}
    for text in texts:
        words = spaced_words(text)
        if words.strip() and not any(words in truth or truth in words for truth in truths):
            found.setdefault(words, text)
        if len(found) == count:
            break
    return list(found.values())


def _value(example: Example) -> str:
    """Return what an answer adds to its question, word by word; all of it where that is nothing."""
    said = set(spaced_words(example.prompt).split())
    words = spaced_words(example.answer).split()
    return " ".join([word for word in words if word not in said] or words)


def _require_facts(given: Mapping[str, Sequence[str]], forget: Sequence[Example]) -> None:
    known = {example.fact for example in forget}
    for fact in given:
        if fact not in known:
            raise UserError(f"placebos are given for {fact!r}, which is no fact to forget{did_you_mean(fact, known)}")
