"""The property that every architecture must have: the same number alone, in a batch, with shared prefixes, with
padding, in any order.

What is right is the model's own forward pass over one row, in float64, without a cache and without padding. Each check
returns the largest gap that it saw; it raises `Disagreement` for one above tolerance, and UserError where stillknows
refuses. Nothing else may happen.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perf.tiny_settings import SWITCH, VOCABULARY, WINDOW
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import score_items
from stillknows.model.generate import generate
from stillknows.model.layers import OutputLayer, output_layer
from stillknows.model.ref import ModelRef
from stillknows.registry import bind
from stillknows.training.loop import fit
from stillknows.training.objective_inputs import Draw, Inputs, Term
from stillknows.training.settings import Settings
from stillknows.types import Example
from stillknows.variants import compress, export, fitting

TOLERANCE = 1e-4  # of ln p, in nats: float32 against float64
CLOSE = 1e-3  # of logits: a token that is as likely as the best one but for rounding
FIRST, LAST = 3, VOCABULARY - 8  # tokens of the items; others are special to some models
LONG = SWITCH + 6  # tokens of the longest question: longer than any window, and beyond the switch of a rope


Check = Callable[[nn.Module, OutputLayer, "Own"], float]


class Disagreement(Exception):
    """A number depends on what it must not depend on."""


class Own:
    """A model's own forward pass over single rows, in float64 where its code allows that."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).double()
        try:
            self((FIRST, FIRST + 1))
        except RuntimeError:
            self.model = copy.deepcopy(model)

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Return the logits [L, V]. One token is read before: some ropes keep the length of the row before."""
        with torch.no_grad():
            self.model(input_ids=torch.tensor([[FIRST]]), use_cache=False)
        return self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double()

    def log_probs(self, item: EncodedAnswer) -> Tensor:
        """Return ln p of an item's answer tokens, [A]."""
        log_probs_LV = self(item.ids).log_softmax(-1)
        return torch.stack([log_probs_LV[i - 1, item.ids[i]] for i in range(max(1, item.start), len(item.ids))])


def apart(seed: int = 0) -> list[EncodedAnswer]:
    """Return items of unlike length that share nothing."""
    draw = random.Random(seed)
    return [
        _item(draw, _tokens(draw, head), 1 + k * 5 % 12) for k, head in enumerate((LONG, 1, 9, 4, 17, 22, 2, SWITCH))
    ]


def sharing(seed: int = 0) -> list[EncodedAnswer]:
    """Return items that begin alike: questions of unlike length after one root, each with several answers."""
    draw = random.Random(seed)
    root = _tokens(draw, WINDOW + 2)
    questions = [root + _tokens(draw, length) for length in (LONG - len(root), 1, 7)]
    return [_item(draw, question, answer) for question in questions for answer in (1, 11, 4)]


def _tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(FIRST, LAST) for _ in range(count))


def _item(draw: random.Random, question: tuple[int, ...], answer: int) -> EncodedAnswer:
    ids = question + _tokens(draw, answer)
    return EncodedAnswer(Example(f"item {len(ids)}", "a question", "an answer", "fact"), ids, len(question), ends=False)


def shuffled(items: Sequence[Any], seed: int = 1) -> list[Any]:
    return random.Random(seed).sample(list(items), len(items))


def check_log_probs(model: nn.Module, layer: OutputLayer, own: Own) -> float:
    """Score items alone, in batches, with shared prefixes, with padding and in another order."""
    lots = [*([item] for item in (*apart(), *sharing())), apart(), sharing(), shuffled([*apart(), *sharing()])]
    with torch.no_grad():
        right = {item.ids: own.log_probs(item) for item in (*apart(), *sharing())}
    gaps = [
        _gap(scores.log_probs, right[lot[i].ids], f"ln p of {len(lot[i].ids)} tokens among {len(lot)} items")
        for lot in lots
        for size in ((64,) if len(lot) == 1 else (3, 64))
        for i, scores in score_items(model, layer, lot, size)
    ]
    return max(gaps)


def _gap(found: Tensor, right: Tensor, what: str, tolerance: float = TOLERANCE) -> float:
    gap = float((found.double() - right).abs().max())
    if not gap <= tolerance * max(1.0, float(right.abs().max())):
        raise Disagreement(f"{what}: off by {gap:.2g}")
    return gap


def check_generation(model: nn.Module, layer: OutputLayer, own: Own) -> float:
    """Continue prompts together and in another order: every token is the most likely one of the model's own pass."""
    prompts = [item.ids[: max(1, item.start)] for item in (*apart(), *sharing()[::3], *sharing()[1::3])]
    limits = [1 + k * 3 % 11 for k in range(len(prompts))]
    ends = set(range(FIRST, VOCABULARY, 12))
    seen: dict[tuple[int, ...], Tensor] = {}
    gaps = [0.0]
    for order in (range(len(prompts)), shuffled(range(len(prompts))), range(len(prompts) - 6, len(prompts))):
        found = generate(model, layer, [prompts[k] for k in order], [limits[k] for k in order], ends)
        gaps += [
            _greedy(own, seen, prompts[k], answer, limits[k], ends) for k, answer in zip(order, found, strict=True)
        ]
    return max(gaps)


@torch.no_grad()
def _greedy(
    own: Own,
    seen: dict[tuple[int, ...], Tensor],
    prompt: tuple[int, ...],
    answer: list[int],
    limit: int,
    ends: set[int],
) -> float:
    """Return by how much the picked tokens were less likely than the best ones: 0 but for rounding."""
    worst = 0.0
    for step in range(min(len(answer) + 1, limit)):
        text = (*prompt, *answer[:step])
        if text not in seen:
            seen[text] = own(text)[-1]
        picked = [answer[step]] if step < len(answer) else sorted(ends)
        worst = max(worst, float(seen[text].max() - seen[text][picked].max()))
        if worst > CLOSE or (step < len(answer) and picked[0] in ends):
            raise Disagreement(f"token {step + 1} after a prompt of {len(prompt)}: {worst:.2g} below the best logit")
    return worst


def check_training(model: nn.Module, layer: OutputLayer, own: Own) -> float:
    """Take one step over a batch: loss and gradient are the means of the items' own."""
    items = shuffled([*apart(), *sharing()])
    term = Term(bind("objective", "nll"), items)
    own.model.requires_grad_(True).zero_grad()
    losses = []
    for item in items:
        loss = -own.log_probs(item).mean() / len(items)
        loss.backward()
        losses.append(float(loss.detach()))
    trained = copy.deepcopy(model).requires_grad_(True)
    draws = [Draw(i, 0) for i in range(len(items))]
    loss = term.objective(**Inputs(trained, output_layer(trained), term, {}, draws)(draws)).mean()
    loss.backward()
    gap = _gap(loss.detach(), torch.tensor(sum(losses)).double(), "loss of a batch")
    own.model.requires_grad_(False)
    gap = max(gap, _gradient_gap(trained, own.model))
    trained.zero_grad()
    done = fit(trained, [term], Settings(lr=1e-4, max_steps=1, batch_size=len(items), check_every=1))
    return max(gap, _gap(torch.tensor(done.history[-1]["loss"]), torch.tensor(sum(losses)).double(), "loss of a step"))


def _gradient_gap(found: nn.Module, right: nn.Module) -> float:
    """Return the largest difference of two gradients, over the largest entry of the right one."""
    wanted = {name: p.grad for name, p in right.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in found.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    gaps = {name: float((got.get(name, torch.zeros_like(g)).double() - g).abs().max()) for name, g in wanted.items()}
    gaps |= {name: float(grad.abs().max()) for name, grad in got.items() if name not in wanted}
    worst = max(gaps, key=gaps.__getitem__)
    if not gaps[worst] <= CLOSE * largest:
        raise Disagreement(f"gradient of {worst}: off by {gaps[worst] / largest:.2g} of the largest entry")
    return gaps[worst] / largest


def check_format(spec: str) -> Check:
    """Return a check of a format of weights: it reaches every linear map, what it makes is scored rightly, and
    afterwards all bits are as before."""

    def check(model: nn.Module, layer: OutputLayer, own: Own) -> float:
        chain = compress.parse_variant(spec)
        fitting.check(model, chain, spec)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with compress.compressed(model, chain):
            changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            gap = _scored(model, layer, Own(model))
        _reached(model, changed)
        after = model.state_dict()
        if any(not torch.equal(after[name], value) for name, value in before.items()):
            raise Disagreement("weights are not as before")
        return gap

    return check


def _scored(model: nn.Module, layer: OutputLayer, own: Own) -> float:
    items = shuffled([*apart(), *sharing()])
    with torch.no_grad():
        return max(_gap(s.log_probs, own.log_probs(items[i]), "ln p") for i, s in score_items(model, layer, items))


def _reached(model: nn.Module, changed: set[str]) -> None:
    """Raise unless a format changed every linear map but the output layer, and no matrix of another kind is large."""
    head, embeddings = model.get_output_embeddings(), set()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            embeddings.add(f"{name}.weight")
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1 and n not in embeddings}
    left = {name: size for name, size in matrices.items() if name not in changed}
    if changed - set(matrices):
        raise Disagreement(f"{min(changed - set(matrices))} was changed")
    if sum(left.values()) > 0.1 * sum(matrices.values()):
        share = sum(left.values()) / sum(matrices.values())
        raise Disagreement(
            f"{share:.0%} of the weights in matrices stay as they are: {max(left, key=left.__getitem__)}"
        )


def check_file(spec: str, folder: Path, out: Path) -> Check:
    """Return a check of a kind of file: read back as an audit reads it, it scores as the model in that format does."""

    def check(model: nn.Module, layer: OutputLayer, own: Own) -> float:
        record = export.export(export.ExportConfig(str(folder), spec), out)
        path = out / record["file"] if record["file"] else out
        file = ModelRef.open(str(path), packed=True).load().model
        items = shuffled([*apart(), *sharing()])
        read = dict(score_items(file, output_layer(file), items))
        with compress.compressed(model, compress.parse_variant(spec)):
            measured = dict(score_items(model, layer, items))
        return max(_gap(read[i].log_probs, measured[i].log_probs.double(), "ln p of the file") for i in measured)

    return check
