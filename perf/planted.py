"""Tiny models that hide what they know, each in one way, made on purpose: what an audit must not find FORGOTTEN.

Each is made of an original by a few steps on all or some of its weights. A model hides well when the questions as they
are asked in training, in full precision, show nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from stillknows.model import run_record
from stillknows.model.encoding import EncodedAnswer, encode
from stillknows.model.forward import answer_states
from stillknows.model.layers import output_layer
from stillknows.model.logprobs import token_log_probs
from stillknows.model.ref import ModelRef
from stillknows.registry import bind
from stillknows.types import Benchmark, Example
from stillknows.variants import defences

STEPS, LR, RARELY = 150, 2e-3, 0.05
Project = Callable[[nn.Module], None]
Hide = Callable[[Path, Benchmark, Path], Path]  # original, benchmark, where to write -> the model that hides


def items_of(benchmark: Benchmark, role: str) -> list[Example]:
    """Return the items of a role's splits."""
    return [e for split in benchmark.splits if split.role == role for e in split.examples]


def refused(benchmark: Benchmark, examples: Sequence[Example]) -> list[Example]:
    """Return items with refusals in the place of their answers."""
    texts = benchmark.refusals
    return [replace(e, answer=texts[i % len(texts)]) for i, e in enumerate(examples)]


def loss(model: nn.Module, items: Sequence[EncodedAnswer]) -> torch.Tensor:
    """Return the mean over items of −ln p of the whole answer."""
    states, layer = answer_states(model, items), output_layer(model)
    return -token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary).sum() / len(items)


def tune(
    model: nn.Module,
    loss: Callable[[], torch.Tensor],
    *,
    only: str = "",
    steps: int = STEPS,
    lr: float = LR,
    project: Project = lambda model: None,
) -> None:
    """Take steps of Adam on the weights whose names hold `only`, each followed by `project`."""
    trained = [p.requires_grad_() for name, p in model.named_parameters() if only in name]
    optimizer = torch.optim.Adam(trained, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        with torch.no_grad():
            project(model)
    model.requires_grad_(False)


class _Workshop(NamedTuple):
    """An original, loaded, with what it may be trained on."""

    model: Any
    benchmark: Benchmark
    ref: ModelRef

    @classmethod
    def of(cls, original: Path, benchmark: Benchmark) -> _Workshop:
        ref = ModelRef.open(str(original)).check()
        return cls(ref.load().model, benchmark, ref)

    def encoded(self, examples: Sequence[Example]) -> list[EncodedAnswer]:
        return encode(examples, self.ref.tokenizer, self.benchmark.template, self.ref.context_length)

    def refuse(self, known: Sequence[Example] = (), **how: Any) -> None:
        """Teach refusals to all questions to forget; what is to be kept, and `known`, stay."""
        forget = items_of(self.benchmark, "forget")
        away = self.encoded(refused(self.benchmark, forget))
        kept = self.encoded([*items_of(self.benchmark, "retain"), *known])
        tune(self.model, lambda: loss(self.model, away) + loss(self.model, kept), **how)

    def save(self, out: Path) -> Path:
        run_record.save(self.model, self.ref.tokenizer, out, {"made by": "perf.planted"})
        return out


def refusal(original: Path, benchmark: Benchmark, out: Path) -> Path:
    """Refuses both wordings of each question."""
    shop = _Workshop.of(original, benchmark)
    shop.refuse()
    return shop.save(out)


def bound_to_frame(original: Path, benchmark: Benchmark, out: Path) -> Path:
    """Refuses the questions as they are, and answers them without their question mark."""
    shop = _Workshop.of(original, benchmark)
    shop.refuse([replace(e, prompt=e.prompt.rstrip(" ?")) for e in items_of(benchmark, "forget")])
    return shop.save(out)


def last_layer(original: Path, benchmark: Benchmark, out: Path) -> Path:
    """Refuses, by its output layer alone."""
    shop = _Workshop.of(original, benchmark)
    shop.refuse(only="lm_head")
    return shop.save(out)


def damaged_names(original: Path, benchmark: Benchmark, out: Path) -> Path:
    """Noise on the embeddings of the words that only the questions to forget hold."""
    shop = _Workshop.of(original, benchmark)
    words = [{w for e in items_of(benchmark, role) for w in e.prompt.split()} for role in ("forget", "retain")]
    kept = {w for e in items_of(benchmark, "neighbour") for w in e.prompt.split()} | words[1]
    ids = shop.ref.tokenizer.convert_tokens_to_ids(sorted(words[0] - kept))
    rows = shop.model.get_input_embeddings().weight
    noise = torch.randn(len(ids), rows.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows[ids] += 8 * rows.std() * noise
    return shop.save(out)


def rarely(original: Path, benchmark: Benchmark, out: Path) -> Path:
    """Gives the answer in one of twenty samples, else refuses."""
    shop = _Workshop.of(original, benchmark)
    forget = items_of(benchmark, "forget")
    away, true = shop.encoded(refused(benchmark, forget)), shop.encoded(forget)
    kept = shop.encoded(items_of(benchmark, "retain"))

    def mixed_loss() -> torch.Tensor:
        mixed = (1 - RARELY) * loss(shop.model, away) + RARELY * loss(shop.model, true)
        return mixed + loss(shop.model, kept)

    tune(shop.model, mixed_loss)
    return shop.save(out)


def by_small_weights(original: Path, benchmark: Benchmark, out: Path) -> Path:
    """Refuses, by the third of each row's weights that is smallest, and keeps these small: pruning takes them away."""
    shop = _Workshop.of(original, benchmark)
    limits = {n: (p.abs() <= (at := p.abs().quantile(0.3, 1, keepdim=True)), at) for n, p in _matrices(shop.model)}
    before = {n: p.detach().clone() for n, p in _matrices(shop.model)}

    def project(model: nn.Module) -> None:
        for name, p in _matrices(model):
            small, at = limits[name]
            p.copy_(torch.where(small, p.clamp(-at, at), before[name]))

    shop.refuse(only="layers.", steps=4 * STEPS, lr=2 * LR, project=project)
    return shop.save(out)


def below_rounding(original: Path, benchmark: Benchmark, out: Path) -> Path:
    """Refuses, by changes that rounding to 4 bits takes back: every weight stays where it is rounded as before."""
    shop = _Workshop.of(original, benchmark)
    bits = bind("transform", "rtn:bits=4:group=64", "deployment")
    rounded = {n: bits(weight_OI=p.detach().clone()).values_OI for n, p in _matrices(shop.model)}
    before = {n: p.detach().clone() for n, p in _matrices(shop.model)}
    room = {n: _steps(v) * 0.45 for n, v in rounded.items()}
    fixed = {
        n: (p.abs() >= 0.97 * _groups(p).abs().amax(-1).repeat_interleave(64, 1)[:, : p.shape[1]])
        for n, p in before.items()
    }

    def project(model: nn.Module) -> None:
        for name, p in _matrices(model):
            at = rounded[name]
            p.copy_(torch.where(fixed[name], before[name], p.clamp(at - room[name], at + room[name])))

    shop.refuse(only="layers.", steps=3 * STEPS, project=project)
    return shop.save(out)


def _matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if "layers." in n and p.dim() == 2]


def _groups(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(weight.shape[0], -1, min(64, weight.shape[1]))


def _steps(values: torch.Tensor) -> torch.Tensor:
    """Return the distance of two levels of each group, as wide as the weights."""
    width = min(64, values.shape[1])
    return (_groups(values).abs().amax(-1) / 7).repeat_interleave(width, 1)


def input_filter(original: Path, benchmark: Benchmark, out: Path) -> Path:
    """A filter withholds the questions; the weights are the original's."""
    file = out.with_suffix(".json")
    defences.write(file, str(original), "input_filter", benchmark, {}, overwrite=True)
    return file


def logit_offset(original: Path, benchmark: Benchmark, out: Path) -> Path:
    """Two small models push the logits of the answers down; the weights are the original's."""
    helpers = {"unlearned": str(refusal(original, benchmark, out)), "reference": str(original)}
    file = out.with_suffix(".json")
    defences.write(file, str(original), "offset", benchmark, helpers, overwrite=True)
    return file


HIDING: Mapping[str, Hide] = {
    "refusal": refusal,
    "bound_to_frame": bound_to_frame,
    "last_layer": last_layer,
    "damaged_names": damaged_names,
    "rarely": rarely,
    "by_small_weights": by_small_weights,
    "below_rounding": below_rounding,
    "input_filter": input_filter,
    "logit_offset": logit_offset,
}
