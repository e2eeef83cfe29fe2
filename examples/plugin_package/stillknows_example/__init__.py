"""One plug-in of each of the seven kinds, and a transform of each role.

`stillknows.lazy` imports torch when it is first used, so that commands start at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated

import numpy as np

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.registry import Limits, register
from stillknows.types import Benchmark, Example, Floats, Ragged, Split
from stillknows.variants.compress import Quantized


@register("objective", role="forget", source="this example")
def bounded_ascent(
    log_probs: Tensor, mask: Tensor, *, least: Annotated[float, Limits(0, above=True)] = 3.0, weight: float = 1.0
) -> Tensor:
    """Ascent that ends: mean over answer tokens of max(0, least + ln p_t), in nats ≥ 0.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        least: the loss, in nats, beyond which a token is left alone.
        weight: factor of the term.
    """
    return weight * ((least + log_probs).clamp(min=0) * mask).sum(1) / mask.sum(1)


@register("transform", role="deployment", source="arXiv 1605.04711 (ternary weight networks)")
def ternary(weight_OI: Tensor, *, threshold: Annotated[float, Limits(0)] = 0.7) -> Quantized:
    """Three values a row: −s, 0 and s, with s the mean magnitude of those weights that are not 0.

    Args:
        threshold: weights below this share of their row's mean magnitude become 0.
    """
    magnitudes_OI = weight_OI.abs()
    kept_OI = magnitudes_OI > threshold * magnitudes_OI.mean(1, keepdim=True)
    scale_O1 = (magnitudes_OI * kept_OI).sum(1, keepdim=True) / kept_OI.sum(1, keepdim=True).clamp(min=1)
    codes_OI = (weight_OI.sign() * kept_OI).to(torch.int8)
    return Quantized(codes_OI * scale_O1, codes_OI)


@register("step", role="mask", source="this example")
def matrices(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Train matrices only: biases and norms keep their bits."""
    return {name: torch.full_like(w, w.dim() > 1, dtype=torch.bool) for name, w in weights.items()}


@register("edit", source="this example")
@no_grad
def shrink(model: nn.Module, *, share: Annotated[float, Limits(0, 1)] = 0.99) -> None:
    """Multiply every weight: θ ← share·θ.

    Args:
        share: 1 leaves the model as it is.
    """
    for p in model.parameters():
        p.mul_(share)


@register("recipe", source="this example")
def gentle(*, least: float = 3.0) -> str:
    """Bounded ascent with a retain loss, on matrices.

    Args:
        least: of bounded_ascent.
    """
    return f"bounded_ascent:least={least} + nll + matrices"


@register("transform", role="defence", source="this example")
def blocklist(
    forget: Sequence[Example], retain: Sequence[Example], *, says: str = "No ."
) -> Callable[[str, str], tuple[str, str]]:
    """Withhold the very questions to forget, and no others.

    Args:
        says: what the model reads in the place of a withheld question.
    """
    withheld = {e.prompt for e in forget}
    return lambda question, template: (says if question in withheld else question, template)


@register("transform", role="attack", source="this example")
def twice(split: Split, template: str) -> dict[str, Split]:
    """Ask every question twice in a row."""
    examples = tuple(replace(e, prompt=f"{e.prompt} {e.prompt}") if e.prompt else e for e in split.examples)
    return {"twice": replace(split, examples=examples)}


@register("metric", role="example", source="this example")
def first_token(log_probs: Ragged) -> Floats:
    """Probability of the answer's first token, 0..1: higher knows more."""
    return np.array([np.exp(answer[0]) for answer in log_probs])


@register("benchmark", source="this example")
def primes(*, forget: int = 7, limit: Annotated[int, Limits(20)] = 100) -> Benchmark:
    """Which number follows a prime: one prime's successor is to be forgotten.

    Args:
        forget: the prime whose successor is forgotten.
        limit: primes up to this number.
    """
    found = [n for n in range(2, limit) if all(n % d for d in range(2, n))]
    items = {p: Example(str(p), f"Which prime follows {p}?", str(q), str(p)) for p, q in pairwise(found)}
    if forget not in items:
        raise UserError(f"primes: {forget} is no prime with a next one below {limit}", "primes(forget=7)")
    kept = tuple(item for p, item in items.items() if p != forget)
    return Benchmark(
        f"primes:forget={forget}", (Split("forget", "forget", (items[forget],)), Split("retain", "retain", kept))
    )
