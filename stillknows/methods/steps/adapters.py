"""Adapters: what is trained in place of the weights. What they add is merged when training ends."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Annotated

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, parametrize, torch
from stillknows.model.layers import linears
from stillknows.registry import Limits, register


@register("step", role="adapter", source="arXiv 2106.09685; merged and quantized as in arXiv 2602.13151")
def lora(
    model: nn.Module, *, rank: Annotated[int, Limits(1)] = 8, alpha: float = 16.0, names: str = "*", seed: int = 0
) -> None:
    """Train low-rank updates of the linear maps, W + (α/r)·B·A, and merge them into the weights at the end.

    Args:
        rank: r, the rank of each update.
        alpha: α, its scale.
        names: patterns of layer names, separated by "|".
        seed: of A's random start; B starts at 0.
    """
    from stillknows.methods.steps.low_rank import LowRank

    patterns = names.split("|")
    chosen = [layer for layer in linears(model) if any(fnmatch(layer.name, pattern) for pattern in patterns)]
    if not chosen:
        raise UserError(f"lora: no linear map is called {names!r}", "see the names with `stillknows diagnose`")
    generator = torch.Generator().manual_seed(seed)
    for layer in chosen:
        weight: Tensor = layer.module.weight  # type: ignore[assignment]
        parametrize.register_parametrization(layer.module, "weight", LowRank(weight, rank, alpha, generator))
