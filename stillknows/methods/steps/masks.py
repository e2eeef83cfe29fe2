"""Masks: which weights may move. Each returns a bool tensor for every trained parameter, by name.

Gradients are means over the whole forget or retain set at the model before unlearning: of the method's own terms, or,
`…_scrambled_gradients`, of the loss of answers in which tokens were replaced. A mask that lets nothing or everything
move is refused where it is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Annotated, Literal

import numpy as np

from stillknows.errors import UserError
from stillknows.lazy import Tensor, functional, torch
from stillknows.registry import Limits, register


@register("step", role="mask", source="arXiv 2410.16454, section 6; units as in FailureLLMUnlearning", version=2)
def sure(
    forget_gradients: Mapping[str, Tensor],
    *,
    percentile: Annotated[float, Limits(0, 100, above=True, below=True)] = 90.0,
    unit: Literal["row", "matrix"] = "row",
) -> dict[str, Tensor]:
    """Saliency-based unlearning with a large learning rate: only units with ‖∇L_forget(θo)‖ ≥ γ move.

    γ is the percentile of the norms over all units of the model, between two of them in proportion. Published with a
    learning rate of 1e-4 where unlearning without a mask takes 1e-5. The published code looks at each batch anew; here
    the mask is made once, at θo, as the paper says. Where more units than the percentile have no gradient at all, as
    embeddings of words that no item holds, γ is 0 and everything would move, which is refused.

    Args:
        percentile: share of units, in percent, that stay as they are; 0 < percentile < 100. Published: 90 and 99.
        unit: what has one norm and moves or stays as a whole. "row": a neuron, that is a row of a matrix or an entry of
            a vector, as the published code has it. "matrix": a whole tensor.
    """
    norms = {
        name: g.float().flatten(1).norm(dim=1) if unit == "row" and g.dim() > 1 else _whole(g.float(), unit)
        for name, g in forget_gradients.items()
    }
    least = float(np.percentile(torch.cat(list(norms.values())).double().cpu().numpy(), percentile))
    return {
        name: (n.double() >= least).reshape(-1, *[1] * (g.dim() - 1)).expand(g.shape)
        for (name, g), n in zip(forget_gradients.items(), norms.values(), strict=True)
    }


def _whole(gradient: Tensor, unit: str) -> Tensor:
    return gradient.abs() if unit == "row" else gradient.norm()[None]


@register("step", role="mask", source="arXiv 2407.01920; defaults of KnowUnDo", version=2)
def memflex(
    forget_scrambled_gradients: Mapping[str, Tensor],
    retain_scrambled_gradients: Mapping[str, Tensor],
    *,
    similarity: Annotated[float, Limits(-1, 1)] = 0.92,
    magnitude: Annotated[float, Limits(0)] = 6e-4,
) -> dict[str, Tensor]:
    """Train whole tensors with cos(∇ℓ_f, ∇ℓ_r) < μ and mean |∇ℓ_f| > σ: those that hold what is to be forgotten.

    ∇ℓ is the gradient of the loss of the items' answers in which tokens were replaced: as many draws as half an answer
    has tokens, one at least, 3 copies of each item, averaged. As published, the tensors are an adapter's: add lora.
    While an adapter's B is 0 its A has no gradient and stays as it is; published adapters have been trained before. The
    published method is `memflex_ga`.

    Args:
        similarity: μ, −1..1; the cosine of a tensor without a gradient counts as 0.
        magnitude: σ ≥ 0. It has the size of gradients, which differs from model to model; the default is published for
            the adapters of Llama-2-7B.
    """
    chosen = {}
    for name, g in forget_scrambled_gradients.items():
        retained = retain_scrambled_gradients[name]
        cosine = functional.cosine_similarity(g.flatten().double(), retained.flatten().double(), dim=0)
        moves = bool(cosine < similarity) and bool(g.abs().mean() > magnitude)
        chosen[name] = torch.full_like(g, moves, dtype=torch.bool)
    return chosen


@register("step", role="mask", source="arXiv 2410.17509; defaults of WAGLE's configurations")
def wagle(
    weights: Mapping[str, Tensor],
    forget_gradients: Mapping[str, Tensor],
    retain_gradients: Mapping[str, Tensor],
    *,
    share: Annotated[float, Limits(0, 1, above=True, below=True)] = 0.95,
    mu: Annotated[float, Limits(0, above=True)] = 1e-6,
) -> dict[str, Tensor]:
    """Weight attribution: the share of single weights with the largest |(θ − g_r/μ)·g_f| moves.

    Args:
        share: of all weights, 0 < share < 1, rounded down to a whole number of them; of equal ones the first move.
        mu: μ > 0, the curvature of the retain loss, taken to be the same for all weights. Published gradients are sums
            over the batches, these are means: for the same mask, divide the published μ by the number of batches.
    """
    scores = {
        name: ((w - retain_gradients[name] / mu) * forget_gradients[name]).abs().float() for name, w in weights.items()
    }
    return _largest(scores, int(share * sum(score.numel() for score in scores.values())))


def _largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return which entries are the `count` largest of all; of equal ones the first.

    Bits of floats ≥ 0 sort as the floats do, so that bisection finds the bound without a copy of all scores.
    """
    bits = {name: score.contiguous().view(torch.int32) for name, score in scores.items()}

    def above(bound: int) -> int:
        return sum(int((b > bound).sum()) for b in bits.values())

    low, high = -1, 2**31 - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if above(middle) <= count else (middle, high)
    chosen, room = {}, count - above(high)
    for name, b in bits.items():
        equal = b == high
        chosen[name] = (b > high) | (equal & (equal.flatten().cumsum(0) <= room).view_as(b))
        room = max(0, room - int(equal.sum()))
    return chosen


@register("step", role="mask", source="arXiv 2403.03218 (RMU trains three matrices)")
def only(weights: Mapping[str, Tensor], *, names: str = "*mlp*") -> dict[str, Tensor]:
    """Train chosen tensors only: those whose name matches one of the patterns.

    Args:
        names: patterns, separated by "|".
    """
    patterns = names.split("|")
    chosen = {name: any(fnmatch(name, pattern) for pattern in patterns) for name in weights}
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in weights):
            raise UserError(f"only: no tensor is called {pattern!r}", f"names look like {next(iter(weights))}")
    if all(chosen.values()):
        raise UserError(f"only: names={names} is every tensor (100 %): that is no mask", "leave it out, or name some")
    return {name: torch.full_like(w, chosen[name], dtype=torch.bool) for name, w in weights.items()}
