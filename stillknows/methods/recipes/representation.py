"""Methods on hidden states, put together as they are published."""

from __future__ import annotations

from typing import Annotated

from stillknows.registry import Limits, register


@register("recipe", source="arXiv 2403.03218 (RMU)")
def rmu(
    *, coefficient: Annotated[float, Limits(0)] = 6.5, alpha: float = 1200.0, layer: float = 0.25, seed: int = 0
) -> str:
    """Representation misdirection: forget states are steered to one random vector, retain states stay as they were.

    Only the matrices by which the feed-forward layers of blocks l − 2 .. l write are trained. The defaults are those
    for Zephyr-7B, whose published layer 7 counts from 0: the eighth of 32 blocks.

    Args:
        coefficient: c, length of the vector.
        alpha: weight of the retain term.
        layer: l, number of the block from 1, or a share of the depth below 1.
        seed: of the random vector.
    """
    return f"steer:coefficient={coefficient}:layer={layer}:seed={seed} + {_kept(alpha, layer)}"


@register("recipe", source="arXiv 2408.06223 (Adaptive RMU)")
def adaptive_rmu(
    *, scale: Annotated[float, Limits(0)] = 5.0, alpha: float = 1200.0, layer: float = 0.25, seed: int = 0
) -> str:
    """Representation misdirection to β times the length of the item's own states: the choice for an unknown model.

    Args:
        scale: β.
        alpha: weight of the retain term.
        layer: l, number of the block from 1, or a share of the depth below 1.
        seed: of the random vector.
    """
    return f"steer_adaptive:scale={scale}:layer={layer}:seed={seed} + {_kept(alpha, layer)}"


def _kept(alpha: float, layer: float) -> str:
    return f"hidden:weight={alpha}:layer={layer} + down_proj:layer={layer}"
