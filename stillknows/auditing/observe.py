"""The only measuring loop: (subject, split) -> observations, which are saved and scored without the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from stillknows.lazy import Tensor
from stillknows.model.encoding import EncodedAnswer, EncodedItem
from stillknows.model.forward import ItemScores
from stillknows.model.target import Target
from stillknows.types import Decoding, Floats, Observations

EXTRA_TOKENS = 8  # tokens that a generation may be longer than the true answer, where the split sets no limit
PLACEBOS = frozenset({"placebos", "placebo_log_probs", "placebo_hits"})  # observed together
OPTIONAL = PLACEBOS | {"generations", "samples", "lowered_log_probs", "gradient_norms"}  # observed if asked for
AnswerSlot = tuple[int, str, int]  # which item, which of its answers (see `_answers`), number


def observe(
    target: Target,
    items: Sequence[EncodedItem],
    *,
    fields: Collection[str] = (),
    decoding: Decoding | None = None,
) -> Observations:
    """Return what the target does on the items.

    One teacher-forced pass serves every likelihood metric: it scores all answers to a prompt, which is read once. One
    item in a hundred is measured alone besides; UserError where that gives other numbers.
    `fields` names what is observed besides: "generations", "samples" and "gradient_norms" cost a generation, several
    generations and a backward pass per item; "lowered_log_probs" needs the items' answers in lower case,
    PLACEBOS their placebos. Items without a prompt are not continued.
    """
    decoding, scores = decoding or Decoding(), _score(target, items)
    own = [scores[i, "answer", 0] for i in range(len(items))]
    examples = [item.answer.example for item in items]
    texts = _generations(target, items, decoding) if "generations" in fields else None
    samples = _samples(target, items, decoding) if "samples" in fields else None
    norms = target.gradient_norms([item.answer for item in items]) if "gradient_norms" in fields else None
    return Observations(
        ids=tuple(e.id for e in examples),
        facts=tuple(e.fact for e in examples),
        prompts=tuple(e.prompt for e in examples),
        answers=tuple(e.answer for e in examples),
        log_probs=tuple(_floats(s.log_probs) for s in own),
        hits=tuple(s.hits.numpy() for s in own),
        **_distributions(own),
        ends=np.array([item.answer.ends for item in items]),
        paraphrase_log_probs=_of_kind(scores, "paraphrase", len(items)),
        wrong_log_probs=_several_of_kind(scores, "wrong", items),
        **_placebos(scores, items) if PLACEBOS & set(fields) else {},
        lowered_log_probs=_of_kind(scores, "lowered", len(items)) if items[0].lowered else None,
        gradient_norms=norms,
        generations=texts,
        samples=samples,
        wordings=tuple(item.wording for item in items) if any(item.wording for item in items) else None,
    )


def _answers(items: Sequence[EncodedItem]) -> Iterator[tuple[AnswerSlot, EncodedAnswer]]:
    """Yield everything that is scored, with its place."""
    for i, item in enumerate(items):
        yield (i, "answer", 0), item.answer
        if item.paraphrase is not None:
            yield (i, "paraphrase", 0), item.paraphrase
        yield from (((i, "wrong", k), wrong) for k, wrong in enumerate(item.wrong))
        yield from (((i, "placebos", k), placebo) for k, placebo in enumerate(item.placebos))
        if item.lowered is not None:
            yield (i, "lowered", 0), item.lowered


def _score(target: Target, items: Sequence[EncodedItem]) -> dict[AnswerSlot, ItemScores]:
    places, answers = zip(*_answers(items), strict=True)
    own = {i for i, (_, kind, _) in enumerate(places) if kind == "answer"}
    return {places[i]: found for i, found in target.score(answers, with_distribution=own).items()}


def _of_kind(scores: Mapping[AnswerSlot, ItemScores], kind: str, count: int) -> tuple[Floats, ...]:
    """Return the log-probabilities of the items' paraphrases or lowered answers, empty where there is none."""
    found = {i: _floats(s.log_probs) for (i, name, _), s in scores.items() if name == kind}
    return tuple(found.get(i, np.empty(0)) for i in range(count))


def _several_of_kind(
    scores: Mapping[AnswerSlot, ItemScores], kind: Literal["wrong", "placebos"], items: Sequence[EncodedItem]
) -> tuple[tuple[Floats, ...], ...]:
    """Return the log-probabilities of the items' wrong answers or placebos."""
    return tuple(
        tuple(_floats(scores[i, kind, k].log_probs) for k in range(len(getattr(item, kind))))
        for i, item in enumerate(items)
    )


def _placebos(scores: Mapping[AnswerSlot, ItemScores], items: Sequence[EncodedItem]) -> dict[str, Any]:
    """Return what is observed of the items' placebos: their texts, log-probabilities and hits."""
    hits = (
        tuple(scores[i, "placebos", k].hits.numpy() for k in range(len(item.placebos))) for i, item in enumerate(items)
    )
    return {
        "placebos": tuple(tuple(one.example.answer for one in item.placebos) for item in items),
        "placebo_log_probs": _several_of_kind(scores, "placebos", items),
        "placebo_hits": tuple(hits),
    }


def _distributions(own: Sequence[ItemScores]) -> dict[str, tuple[Floats, ...]]:
    """Return the entropies and spreads of the answers' places; nothing where a target does not say them."""
    if any(len(s.entropies) != len(s.log_probs) for s in own):
        return {}
    return {"entropies": tuple(_floats(s.entropies) for s in own), "spreads": tuple(_floats(s.spreads) for s in own)}


def _floats(values: Tensor) -> Floats:
    return values.double().numpy()


def _generations(target: Target, items: Sequence[EncodedItem], decoding: Decoding) -> tuple[str | None, ...]:
    """Continue every prompt greedily."""
    asked = [i for i, item in enumerate(items) if item.answer.example.prompt]
    texts = _continued(target, [items[i].answer for i in asked], decoding)
    found = dict(zip(asked, texts, strict=True))
    return tuple(found.get(i) for i in range(len(items)))


def _samples(target: Target, items: Sequence[EncodedItem], decoding: Decoding) -> tuple[tuple[str, ...] | None, ...]:
    """Continue every prompt several times by sampling; an item's samples depend on its place and the seed alone."""
    asked = [i for i, item in enumerate(items) if item.answer.example.prompt]
    found: dict[int, list[str]] = {i: [] for i in asked}
    temperatures = decoding.temperatures or (decoding.temperature,)
    for k, temperature in enumerate(temperatures):
        drawn = [i for i in asked for _ in range(k, decoding.samples, len(temperatures))]
        seed = decoding.seed * len(temperatures) + k  # of its own, so that the temperatures draw independently
        texts = _continued(target, [items[i].answer for i in drawn], decoding, temperature, seed)
        for i, text in zip(drawn, texts, strict=True):
            found[i].append(text)
    return tuple(tuple(found[i]) if i in found else None for i in range(len(items)))


def _continued(
    target: Target, items: Sequence[EncodedAnswer], decoding: Decoding, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    limits = [decoding.new_tokens or len(item.ids) - item.start + EXTRA_TOKENS for item in items]
    texts = target.generate(items, limits, temperature, seed)
    return [_cut(text, decoding.stop) for text in texts]


def _cut(text: str, stops: Sequence[str]) -> str:
    """Return what comes before the first of the stops, without space around it."""
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()
