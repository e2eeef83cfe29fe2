"""Other answers to the questions of a split, which some terms train with beside the true ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillknows.errors import UserError
from stillknows.lazy import nn
from stillknows.model.encoding import EncodedAnswer, LongItems, encode
from stillknows.model.generate import end_tokens, generate, sampled
from stillknows.model.layers import output_layer
from stillknows.types import Example
from stillknows.unlearning import exchanged_answers, frames

CHOICES = 5  # answers of a kind to each question
ATTEMPTS = 8  # rounds of sampling before a question without a usable alternative is given up


@dataclass(frozen=True)
class Answering:
    """How other answers to a split's questions are written down, as its own are."""

    tokenizer: Any
    template: str
    context: int
    seed: int
    long_items: LongItems = "error"

    def answers(self, item: EncodedAnswer, texts: Sequence[str]) -> tuple[EncodedAnswer, ...]:
        """Return an item's question with other answers; a plain text's first half stands in the place of a question."""
        prompt, template = item.example.prompt, self.template
        if not prompt:
            prompt, template = first_half(item.example.answer), "{prompt}"
        examples = [replace(item.example, prompt=prompt, answer=text) for text in texts]
        return tuple(encode(examples, self.tokenizer, template, self.context, self.long_items))

    def framed(self, example: Example, text: str, frame: str) -> EncodedAnswer:
        """Return an example's question in a frame, with an answer."""
        prompt, template = frames.in_frame(frame, example.prompt, self.template)
        asked = replace(example, prompt=prompt, answer=text)
        return encode([asked], self.tokenizer, template, self.context, self.long_items)[0]

    def choice(self, number: int) -> random.Random:
        """Return the source of an item's random choices."""
        return random.Random(f"{self.seed} {number}")


def first_half(text: str) -> str:
    """Return a text up to the last space before its middle, or to its middle; a single character whole."""
    half = text[: len(text) // 2]
    return half.rpartition(" ")[0].strip() or half.strip() or text


def check(
    items: Sequence[EncodedAnswer], wanted: frozenset[str], others: Sequence[EncodedAnswer], benchmark: str
) -> None:
    """Raise UserError when companions of these kinds cannot be made. Needs no model.

    Args:
        others: the items whose answers may take the place of an item's own.
    """
    asking = sorted(wanted - {"refusal"})
    if asking and any(not item.example.prompt for item in items):
        raise UserError(
            f"{benchmark} has plain texts, and {' and '.join(asking)} answers belong to questions",
            "choose a method that needs no other answers, such as npo + kl, or refusals only, such as idk",
        )
    values = {item.example.answer for item in (*items, *_questions(others))}
    if wanted & {"mismatched", "exchanged"} and len(values) < 2:
        raise UserError(f"{benchmark} has one answer only, so no answer of another question", "add questions")


def refusals(items: Sequence[EncodedAnswer], texts: Sequence[str], how: Answering) -> list[tuple[EncodedAnswer, ...]]:
    """Return for each item up to CHOICES of these refusals, drawn by the seed."""
    count = min(CHOICES, len(texts))
    return [how.answers(item, how.choice(i).sample(list(texts), count)) for i, item in enumerate(items)]


def mismatched(
    items: Sequence[EncodedAnswer], others: Sequence[EncodedAnswer], how: Answering
) -> list[tuple[EncodedAnswer, ...]]:
    """Return for each item up to CHOICES answers that belong to other questions, drawn by the seed.

    They are taken from `others`, items that are kept, so that nothing to be forgotten is taught; from the items
    themselves where those have no other answer.
    """
    kept, own = (sorted({item.example.answer for item in found}) for found in (_questions(others), items))
    found = []
    for i, item in enumerate(items):
        pools = ([text for text in pool if text != item.example.answer] for pool in (kept, own))
        pool = next(filter(None, pools))
        found.append(how.answers(item, how.choice(i).sample(pool, min(CHOICES, len(pool)))))
    return found


def _questions(items: Sequence[EncodedAnswer]) -> list[EncodedAnswer]:
    return [item for item in items if item.example.prompt]


def exchanged(
    items: Sequence[EncodedAnswer], others: Sequence[EncodedAnswer], count: int, how: Answering
) -> list[tuple[EncodedAnswer, ...]]:
    """Return for each item `count` answers that could as well have been true, every second one in another frame.

    Args:
        others: kept items, whose answers may take the place of an item's own.
    """
    texts = exchanged_answers.draws(
        [i.example for i in items], [i.example for i in _questions(others)], count, how.seed
    )
    for item, drawn in zip(items, texts, strict=True):
        if not drawn:
            raise UserError(
                f"item {item.example.id!r}: every answer of the benchmark is true of it or a part of it",
                "add items with other answers to what is kept, or choose a method without exchanged answers: npo + nll",
            )
    return [_in_frames(item, drawn, i, how) for i, (item, drawn) in enumerate(zip(items, texts, strict=True))]


def _in_frames(item: EncodedAnswer, texts: Sequence[str], number: int, how: Answering) -> tuple[EncodedAnswer, ...]:
    """Return an item's question with these answers, every second one in a frame other than its own."""
    forms = [form for form in frames.TRAINED if frames.changes(form, item.example.prompt, how.template)]
    found = []
    for place, text in enumerate(texts):
        framed = forms[(number + place // 2) % len(forms)] if place % 2 and forms else frames.AS_ASKED
        found.append(how.framed(item.example, text, framed))
    return tuple(found)


def alternatives(
    model: nn.Module, items: Sequence[EncodedAnswer], others: Sequence[EncodedAnswer], how: Answering
) -> list[tuple[EncodedAnswer, ...]]:
    """Return for each item CHOICES answers that the model gives itself at temperature 1, other than the true one.

    A model that knows its facts well may give none: then values of the same kind take their place, of kept items or of
    each other. Raises UserError for a question to which there is no other answer at all.

    Args:
        others: kept items.
    """
    found: list[list[str]] = [[] for _ in items]
    for attempt in range(ATTEMPTS):
        short = [i for i, texts in enumerate(found) if len(texts) < CHOICES]
        for i, text in _sampled(model, [items[i] for i in short], how, attempt):
            if text.strip() and text.strip() != items[short[i]].example.answer.strip():
                found[short[i]].append(text.strip())
    if not all(found):
        kept = [item.example for item in _questions(others)]
        drawn = exchanged_answers.draws([item.example for item in items], kept, CHOICES, how.seed)
        found = [texts or instead for texts, instead in zip(found, drawn, strict=True)]
    for item, texts in zip(items, found, strict=True):
        if not texts:
            raise UserError(
                f"the model gives no answer but the true one to {item.example.prompt!r}",
                "use idk or dpo, which take refusals instead",
            )
    return [how.answers(item, texts[:CHOICES]) for item, texts in zip(items, found, strict=True)]


def _sampled(
    model: nn.Module, items: Sequence[EncodedAnswer], how: Answering, attempt: int
) -> Iterator[tuple[int, str]]:
    """Yield (item, text) of CHOICES sampled answers to each item, as long as the true one or twice that."""
    if not items:
        return
    prompts = [item.ids[: item.start] for item in items for _ in range(CHOICES)]
    limits = [2 * (len(item.ids) - item.start) for item in items for _ in range(CHOICES)]
    limits = [min(limit, how.context - len(p)) for limit, p in zip(limits, prompts, strict=True)]
    ends = end_tokens(model, how.tokenizer, items)
    rows = generate(model, output_layer(model), prompts, limits, ends, sampled(1.0, how.seed + attempt))
    for row, ids in enumerate(rows):
        yield row // CHOICES, how.tokenizer.decode(ids, skip_special_tokens=True)
