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
    for Zephyr-7B, whose published layer 7 counts from 0: the eighth of 32 blocks; with a learning rate of 5e-5 and 150
    steps of 4 items there. They fit models of that size only: c is a length of its states, and α a weight against them.
    On the built-in example's model of 4.5 million weights they leave .9 of the knowledge and alpha=100 .02;
    `adaptive_rmu` finds c on the model.

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

    α is the published weight for 7 billion weights; on small models, at rates that fit them, it may hold the model
    fast: lower it where what is to be forgotten stays.

    Args:
        scale: β.
        alpha: weight of the retain term.
        layer: l, number of the block from 1, or a share of the depth below 1.
        seed: of the random vector.
    """
    return f"steer_adaptive:scale={scale}:layer={layer}:seed={seed} + {_kept(alpha, layer)}"


@register("recipe", source="arXiv 2406.04313 (circuit breakers) and its published code")
def circuit_breakers(
    *, alpha: Annotated[float, Limits(0)] = 10.0, layer: float = 0.33, rank: Annotated[int, Limits(1)] = 16
) -> str:
    """Representation rerouting: forget states are turned away from what they were, retain states stay, by adapters.

    Published: adapters of rank 16 on the first 21 of 32 blocks, states of blocks 10 and 20 rerouted, the distance of
    the retain states at all blocks kept, lr 1e-4, 150 steps, and weights that go from forgetting to retaining
    (α·(1 − t/2T) and α·t/2T). Here the states of one block are rerouted and kept (their mean square difference), with
    equal weights all along, and adapters are on all blocks.

    Args:
        alpha: α, weight of both terms.
        layer: l, number of the block from 1, or a share of the depth below 1; published are 10 and 20 of 32.
        rank: of the adapters.
    """
    return f"reroute:weight={alpha}:layer={layer} + hidden:weight={alpha}:layer={layer} + lora:rank={rank}:alpha={rank}"


def _kept(alpha: float, layer: float) -> str:
    return f"hidden:weight={alpha}:layer={layer} + down_proj:layer={layer}"
