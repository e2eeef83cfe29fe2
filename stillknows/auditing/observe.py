"""The only measuring loop: (subject, split) -> observations, which are saved and scored without the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from stillknows.lazy import enable_grad, nn, no_grad, torch
from stillknows.model.alone import require_greedy_alone, require_scores_alone
from stillknows.model.encoding import Asked, Encoded
from stillknows.model.forward import ItemScores, answer_states, score_items
from stillknows.model.generate import end_tokens, generate, greedy, sampled
from stillknows.model.layers import OutputLayer, output_layer
from stillknows.model.logprobs import token_log_probs
from stillknows.types import Decoding, Floats, Observations

SLACK = 8  # tokens that a generation may be longer than the true answer, where the split sets no limit
OPTIONAL = frozenset(  # observed if asked for
    {"generations", "samples", "lowered_log_probs", "placebo_log_probs", "gradient_norms"}
)
Place = tuple[int, str, int]  # which item, which of its answers (see `_answers`), number


@no_grad
def observe(
    model: nn.Module,
    tokenizer,
    items: Sequence[Asked],
    *,
    fields: Collection[str] = (),
    decoding: Decoding | None = None,
) -> Observations:
    """Return what the model does on the items.

    One teacher-forced pass serves every likelihood metric: it scores all answers to a prompt, which is read once. One
    item in a hundred is measured alone besides; UserError where that gives other numbers.
    `fields` names what is observed besides: "generations", "samples" and "gradient_norms" cost a generation, several
    generations and a backward pass per item; "lowered_log_probs" needs the items' answers in lower case,
    "placebo_log_probs" their placebos. Items
    without a prompt are not continued.
    """
    layer = output_layer(model)
    scores = _score(model, layer, items)
    own = [scores[i, "answer", 0] for i in range(len(items))]
    examples = [item.answer.example for item in items]
    decoding = decoding or Decoding()
    texts = _generations(model, layer, tokenizer, items, decoding) if "generations" in fields else None
    samples = _samples(model, layer, tokenizer, items, decoding) if "samples" in fields else None
    return Observations(
        ids=tuple(e.id for e in examples),
        facts=tuple(e.fact for e in examples),
        prompts=tuple(e.prompt for e in examples),
        answers=tuple(e.answer for e in examples),
        log_probs=tuple(_floats(s.log_probs) for s in own),
        hits=tuple(s.hits.numpy() for s in own),
        entropies=tuple(_floats(s.entropies) for s in own),
        spreads=tuple(_floats(s.spreads) for s in own),
        ends=np.array([item.answer.ends for item in items]),
        paraphrase_log_probs=_of_kind(scores, "paraphrase", len(items)),
        wrong_log_probs=_several_of_kind(scores, "wrong", items),
        placebo_log_probs=_several_of_kind(scores, "placebos", items) if "placebo_log_probs" in fields else None,
        lowered_log_probs=_of_kind(scores, "lowered", len(items)) if items[0].lowered else None,
        gradient_norms=_gradient_norms(model, layer, items) if "gradient_norms" in fields else None,
        generations=texts,
        samples=samples,
        wordings=tuple(item.wording for item in items) if any(item.wording for item in items) else None,
    )


def _answers(items: Sequence[Asked]) -> Iterator[tuple[Place, Encoded]]:
    """Yield everything that is scored, with its place."""
    for i, item in enumerate(items):
        yield (i, "answer", 0), item.answer
        if item.paraphrase is not None:
            yield (i, "paraphrase", 0), item.paraphrase
        yield from (((i, "wrong", k), wrong) for k, wrong in enumerate(item.wrong))
        yield from (((i, "placebos", k), placebo) for k, placebo in enumerate(item.placebos))
        if item.lowered is not None:
            yield (i, "lowered", 0), item.lowered


def _score(model: nn.Module, layer: OutputLayer, items: Sequence[Asked]) -> dict[Place, ItemScores]:
    places, answers = zip(*_answers(items), strict=True)
    thorough = {i for i, (_, kind, _) in enumerate(places) if kind == "answer"}
    scores = dict(score_items(model, layer, answers, thorough=thorough))
    require_scores_alone(model, layer, answers, scores)
    return {places[i]: scores[i] for i in range(len(places))}


def _of_kind(scores: Mapping[Place, ItemScores], kind: str, count: int) -> tuple[Floats, ...]:
    """Return the log-probabilities of the items' paraphrases or lowered answers, empty where there is none."""
    found = {i: _floats(s.log_probs) for (i, name, _), s in scores.items() if name == kind}
    return tuple(found.get(i, np.empty(0)) for i in range(count))


def _several_of_kind(
    scores: Mapping[Place, ItemScores], kind: Literal["wrong", "placebos"], items: Sequence[Asked]
) -> tuple[tuple[Floats, ...], ...]:
    """Return the log-probabilities of the items' wrong answers or placebos."""
    return tuple(
        tuple(_floats(scores[i, kind, k].log_probs) for k in range(len(getattr(item, kind))))
        for i, item in enumerate(items)
    )


def _floats(values: torch.Tensor) -> Floats:
    return values.double().numpy()


def _generations(
    model: nn.Module, layer: OutputLayer, tokenizer, items: Sequence[Asked], decoding: Decoding
) -> tuple[str | None, ...]:
    """Continue every prompt greedily."""
    asked = [i for i, item in enumerate(items) if item.answer.example.prompt]
    texts = _continued(model, layer, tokenizer, [items[i].answer for i in asked], decoding, greedy)
    found = dict(zip(asked, texts, strict=True))
    return tuple(found.get(i) for i in range(len(items)))


def _samples(
    model: nn.Module, layer: OutputLayer, tokenizer, items: Sequence[Asked], decoding: Decoding
) -> tuple[tuple[str, ...] | None, ...]:
    """Continue every prompt several times by sampling; an item's samples depend on its place and the seed alone."""
    asked = [i for i, item in enumerate(items) if item.answer.example.prompt]
    prompts = [items[i].answer for i in asked for _ in range(decoding.samples)]
    pick = sampled(decoding.temperature, decoding.seed)
    texts = iter(_continued(model, layer, tokenizer, prompts, decoding, pick))
    found = {i: tuple(next(texts) for _ in range(decoding.samples)) for i in asked}
    return tuple(found.get(i) for i in range(len(items)))


def _continued(
    model: nn.Module, layer: OutputLayer, tokenizer, items: Sequence[Encoded], decoding: Decoding, pick
) -> list[str]:
    limits = [decoding.new_tokens or len(item.ids) - item.start + SLACK for item in items]
    prompts = [item.ids[: item.start] for item in items]
    ends = end_tokens(model, tokenizer, items)
    rows = generate(model, layer, prompts, limits, ends, pick)
    if pick is greedy:
        require_greedy_alone(model, layer, prompts, rows, limits, ends)
    return [_cut(tokenizer.decode(row, skip_special_tokens=True), decoding.stop) for row in rows]


def _cut(text: str, stops: Sequence[str]) -> str:
    """Return what comes before the first of the stops, without space around it."""
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()


@enable_grad
def _gradient_norms(model: nn.Module, layer: OutputLayer, items: Sequence[Asked]) -> Floats:
    """Return |∇θ NLL| of every true answer, NLL its mean over tokens; the parameters are left as they were."""
    before = {p: p.requires_grad for p in model.parameters()}
    parameters = list(model.requires_grad_(True).parameters())
    norms = []
    for item in items:
        states = answer_states(model, [item.answer])
        nll = -token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary).mean()
        gradients = torch.autograd.grad(nll, parameters, allow_unused=True)
        norms.append(torch.stack([g.double().norm() for g in gradients if g is not None]).norm().item())
    for p, needed in before.items():
        p.requires_grad_(needed)
    return np.array(norms)
