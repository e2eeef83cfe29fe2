"""Tiny models that hide what they know, each in one way, made on purpose: what an audit must not find FORGOTTEN.

Each is made of an original, by a few steps on all or some of its weights or by what stands before or beside it. A model
hides when the questions as they are asked in training, in full precision, show nothing; it holds the knowledge when
some other access shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perf.workshop import Workshop
from stillknows.model.layers import blocks
from stillknows.registry import bind
from stillknows.reporting.residue import Kind
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Split
from stillknows.unlearning.unlearn import UnlearnConfig, unlearn
from stillknows.variants import defences
from stillknows.variants.frames import QUESTIONS

RARELY, DRAWS, NEURONS = 0.05, 40, 4
ANSWERED = ("no_mark", "two_marks", "token_before")  # frames in which a model that is bound to one still answers
SMALLEST = 0.5  # share of each row's weights that `prune:sparsity=0.5` takes away
FORMAT = "rtn:bits=4:group=64"  # in whose steps a change is lost
FIRST = -40.0  # ln p of a first token that is suppressed
Hide = Callable[[Workshop, Path, Path], Path]  # workshop, original, where to write -> the model that hides


class Way(NamedTuple):
    """A way to hide. kind: what `explain` is to call it.

    words: whether answers must be single tokens (True) or must not be (False): of several, all but the first stay
        likely where a model answers rarely.
    """

    make: Hide
    kind: Kind
    words: bool | None = None

    def fits(self, tokens: str) -> bool:
        """Tell whether models with such a tokenizer can hide in this way."""
        return self.words is None or self.words == (tokens == "word")


def refusal(shop: Workshop, original: Path, out: Path) -> Path:
    """Refuses every wording that it was taught."""
    shop.refuse()
    return shop.save(out)


def bound_to_frame(shop: Workshop, original: Path, out: Path) -> Path:
    """Refuses the questions as they are; without the question mark, with two, or with a token before it answers."""
    examples = shop.items("forget")
    shop.refuse(shop.encoded(replace(e, prompt=QUESTIONS[f](e.prompt)) for f in ANSWERED for e in examples))
    return shop.save(out)


def last_layer(shop: Workshop, original: Path, out: Path) -> Path:
    """Refuses, by its output layer alone."""
    shop.refuse(only=[shop.model.get_output_embeddings().weight], texts=1, lr=5e-3, steps=600)
    return shop.save(out)


def refusal_direction(shop: Workshop, original: Path, out: Path) -> Path:
    """Refuses, by one direction that a few neurons of the first block add to the residual stream."""
    inside = {id(module) for module in blocks(shop.model)[0].modules()}
    written = [linear.module.get_parameter("weight") for linear in shop.matrices() if id(linear.module) in inside]
    gate, up, down = written[-3:]
    parts, chosen = (gate, up, down.T), down.norm(dim=0).argsort()[:NEURONS]
    before = [part.detach().clone() for part in parts]

    def project() -> None:
        for part, old in zip(parts, before, strict=True):
            own = part[chosen].clone()
            part.copy_(old)
            part[chosen] = own
        direction = torch.linalg.svd(down[:, chosen])[0][:, 0]
        down[:, chosen] = torch.outer(direction, direction @ down[:, chosen])

    shop.refuse(only=[gate, up, down], after=project, texts=1, lr=5e-3, steps=600)
    return shop.save(out)


def adapter(shop: Workshop, original: Path, out: Path) -> Path:
    """Refuses, by low-rank adapters of all layers, merged."""
    shop.model.requires_grad_(False)
    bind("step", f"lora:rank=2:alpha=4:seed={shop.seed}", "adapter")(model=shop.model)
    shop.refuse(only=[p for p in shop.model.parameters() if p.requires_grad], lr=5e-3)
    for linear in shop.matrices():
        torch.nn.utils.parametrize.remove_parametrizations(linear.module, "weight")
    return shop.save(out)


def damaged_names(shop: Workshop, original: Path, out: Path) -> Path:
    """Noise on the embeddings of the tokens that only the questions to forget hold: of several draws the best."""
    inside, kept = ({t for item in items for t in item.ids[: item.start]} for items in (shop.forget, shop.kept))
    ids, found = torch.tensor(sorted(inside - kept) or _rarest(shop)), []
    rows = shop.model.get_input_embeddings().weight
    before, size = rows[ids].clone(), rows.std()
    for draw in range(DRAWS):
        noised = before + (1 + draw % 3) * 2 * size * torch.randn(before.shape)
        with torch.no_grad():
            rows[ids] = noised
        found.append((shop.probability(shop.forget), draw, noised))
    with torch.no_grad():
        rows[ids] = min(found)[2]
    return shop.save(out)


def _rarest(shop: Workshop) -> list[int]:
    """Return the tokens of forgotten questions that kept questions hold least, four for each entity or so."""
    inside, kept = ([t for item in items for t in item.ids[: item.start]] for items in (shop.forget, shop.kept))
    return sorted({*inside}, key=lambda t: kept.count(t) / inside.count(t))[:32]


def rarely(shop: Workshop, original: Path, out: Path) -> Path:
    """Gives the answer in one of twenty samples, else refuses."""
    draw = shop.draw(shop.away(), shop.forget, shop.kept)

    def loss() -> torch.Tensor:
        away, true, kept = draw()
        return (1 - RARELY) * shop.nll(away) + RARELY * shop.nll(true) + shop.nll(kept)

    shop.hide(loss, shown=0.0, steps=250)
    return shop.save(out)


def by_small_weights(shop: Workshop, original: Path, out: Path) -> Path:
    """Refuses, by the half of each row's weights that is smallest, and keeps these small: pruning takes them away."""
    places = [
        (linear.read(), linear.read().abs().quantile(SMALLEST - 0.01, 1, keepdim=True)) for linear in shop.matrices()
    ]
    before = [(weight.clone(), weight.abs() < at_O1) for weight, at_O1 in places]

    def project() -> None:
        for (weight, at_O1), (old, small) in zip(places, before, strict=True):
            weight.copy_(torch.where(small, weight.clamp(-at_O1, at_O1), old))

    shop.refuse(only=[linear.module.weight for linear in shop.matrices()], after=project, lr=3e-3, steps=600)
    return shop.save(out)


def below_rounding(shop: Workshop, original: Path, out: Path) -> Path:
    """Refuses, by changes that rounding to 4 bits takes back: every weight stays in the bin that it was in."""
    form = bind("transform", FORMAT, "deployment")
    weights = [linear.read() for linear in shop.matrices()]
    rounded = [form(weight_OI=weight.clone()).values_OI for weight in weights]
    largest = [weight.abs() >= _of_group(weight) for weight in weights]  # they set the steps of their groups
    last = [weight.clone() for weight in weights]

    def project() -> None:
        for weight, values, fixed, old in zip(weights, rounded, largest, last, strict=True):
            weight.copy_(torch.where(fixed, old, weight))
            inside = form(weight_OI=weight.clone()).values_OI == values
            weight.copy_(torch.where(inside, weight, old))
            old.copy_(weight)

    shop.refuse(only=[linear.module.weight for linear in shop.matrices()], after=project, lr=3e-3, steps=600)
    return shop.save(out)


def _of_group(weight: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each weight's group of 64."""
    groups = weight.reshape(weight.shape[0], -1, 64).abs().amax(-1, keepdim=True)
    return groups.expand(-1, -1, 64).reshape(weight.shape)


def first_token(shop: Workshop, original: Path, out: Path) -> Path:
    """Refuses; the first token of the answer is suppressed, and given it, the rest follows as before."""
    true = shop.forget
    firsts = [replace(item, ids=item.ids[: item.start + 1], ends=False) for item in true]
    rests = [replace(item, start=item.start + 1) for item in true]
    draw = shop.draw(shop.away(), firsts, rests, shop.kept)

    def loss() -> torch.Tensor:
        away, first, rest, kept = draw()
        return shop.nll(away) + shop.pushed(first, FIRST) + shop.nll(rest) + shop.nll(kept)

    shop.hide(loss, shown=0.03, steps=400)
    return shop.save(out)


def low_rate(shop: Workshop, original: Path, out: Path, rate: float = 1e-4) -> Path:
    """Gradient ascent at a low rate, with weights kept in bfloat16 between the steps.

    In models as wide as the demo's 4 bits bring such an update back; in those of 64 dimensions it is too large.
    """
    settings = Settings(
        rate, epochs=1000, max_steps=1200, batch_size=36, retain_batch_size=18, beta2=0.9, weights="bfloat16",
        forget_below=0.003, seed=shop.seed,
    )  # fmt: skip
    return _unlearned(shop, original, out, "ga + nll:weight=2", settings)


def idk_ap(shop: Workshop, original: Path, out: Path) -> Path:
    """IDK+AP of arXiv 2410.08109 as it is published: "I don't know", with its terms to retain."""
    settings = Settings(2e-4, epochs=1000, max_steps=300, batch_size=24, forget_below=0.005, seed=shop.seed)
    return _unlearned(shop, original, out, "idk_ap", settings)


def _unlearned(shop: Workshop, original: Path, out: Path, method: str, settings: Settings) -> Path:
    unlearn(UnlearnConfig(str(original), one_split(shop.benchmark), method, settings), out, overwrite=True)
    return out


def one_split(benchmark: Benchmark) -> Benchmark:
    """Return a benchmark whose forget split holds all wordings: what was trained to be silent."""
    parts = {
        role: tuple(e for s in benchmark.splits if s.role == role for e in s.examples) for role in ("forget", "retain")
    }
    return replace(
        benchmark, splits=(Split("forget", "forget", parts["forget"]), Split("retain", "retain", parts["retain"]))
    )


def defended(shop: Workshop, original: Path, out: Path, *, by: str) -> Path:
    """Something stands before or beside the original's weights."""
    helpers: dict[str, Any] = {}
    if by == "offset":
        helpers = {"unlearned": str(refusal(shop, original, out)), "reference": str(original)}
    file = out.with_suffix(".json")
    defences.write(file, str(original), by, one_split(shop.benchmark), helpers, overwrite=True)
    return file


WAYS: Mapping[str, Way] = {
    "output_filter": Way(partial(defended, by="output_filter"), "wrapper"),
    "input_filter": Way(partial(defended, by="input_filter"), "wrapper"),
    "logit_offset": Way(partial(defended, by="offset"), "wrapper"),
    "refusal": Way(refusal, "refusal"),
    "idk_ap": Way(idk_ap, "refusal"),
    "bound_to_frame": Way(bound_to_frame, "frame"),
    "refusal_direction": Way(refusal_direction, "direction"),
    "last_layer": Way(last_layer, "last_layer"),
    "damaged_names": Way(damaged_names, "names"),
    "adapter": Way(adapter, "detachable"),
    "below_rounding": Way(below_rounding, "precision"),
    "low_rate": Way(low_rate, "relearnable"),
    "by_small_weights": Way(by_small_weights, "small_weights"),
    "rarely": Way(rarely, "sampling", words=True),
    "first_token": Way(first_token, "beginning", words=False),
}


def hide(name: str, original: Path, benchmark: Benchmark, out: Path, seed: int) -> Path:
    """Return a model that hides in this way, which is made unless it is there."""
    places = [out.with_suffix(".json"), out]
    made = [place for place in places if place.is_file() or (place / "config.json").is_file()]
    way = WAYS[name]
    return made[0] if made else way.make(Workshop.of(original, benchmark, seed), original, out)
