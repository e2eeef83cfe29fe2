"""Masks that go by the place of a tensor in the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.model.architecture import number_of, role_of
from stillknows.model.layers import block_number
from stillknows.registry import Limits, register


@register("step", role="mask", source="arXiv 2403.03218 (RMU trains three matrices)")
def down_proj(
    weights: Mapping[str, Tensor], *, layer: float = 0.25, count: Annotated[int, Limits(1)] = 3
) -> dict[str, Tensor]:
    """Train the matrices only by which the feed-forward layers of some blocks write: blocks l − count + 1 .. l.

    Args:
        layer: l, number of the last of these blocks from 1, or a share of the depth below 1.
        count: how many blocks; fewer where l is smaller.
    """
    modules = {name: name.removesuffix(".weight") for name in weights}
    numbers = {name: number_of(module) + 1 for name, module in modules.items() if role_of(module) == "down"}
    if not numbers:
        raise UserError(
            "down_proj: no tensor has the name of a feed-forward layer's output",
            f"choose tensors by only:names=…; names look like {next(iter(weights))}",
        )
    last = block_number(layer, max(numbers.values()))
    chosen = {name for name, number in numbers.items() if last - count < number <= last}
    return {name: torch.full_like(w, name in chosen, dtype=torch.bool) for name, w in weights.items()}
