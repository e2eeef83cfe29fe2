"""Terms on hidden states: what a decoder block puts out where answer tokens are predicted, [B, A, D].

Means of squares run over answer tokens and over the D hidden features, as in the published code. An item is judged
where its answer is predicted (all of it, for plain texts); published code on plain texts takes every token.
"""

from __future__ import annotations

from typing import Annotated

from stillknows.lazy import Tensor, functional, torch
from stillknows.registry import Limits, register


@register("objective", role="forget", source="arXiv 2403.03218 (RMU)")
def steer(
    hidden: Tensor,
    mask: Tensor,
    *,
    coefficient: Annotated[float, Limits(0)] = 6.5,
    layer: float = 0.25,
    seed: int = 0,
    weight: float = 1.0,
) -> Tensor:
    """Representation misdirection: mean of (h_l(f) − c·u)², u one random unit vector for all tokens and steps.

    The entries of u are drawn evenly from 0..1 before it is scaled to length 1. `rmu` is the whole published method.

    Args:
        hidden: h_l, output of decoder block l, [B, A, D].
        mask: true at answer tokens, [B, A].
        coefficient: c ≥ 0, length of what the states are drawn to; 6.5 is for Zephyr-7B's eighth block.
        layer: l, number of the block from 1, or a share of the depth below 1.
        seed: of u.
        weight: factor γ of the term.
    """
    goal_D = coefficient * _direction(hidden, seed)
    return weight * _mean_square(hidden - goal_D, mask)


@register("objective", role="forget", source="arXiv 2408.06223 (Adaptive RMU)")
def steer_adaptive(
    hidden: Tensor,
    reference_hidden: Tensor,
    mask: Tensor,
    *,
    scale: Annotated[float, Limits(0)] = 5.0,
    layer: float = 0.25,
    seed: int = 0,
    weight: float = 1.0,
) -> Tensor:
    """Misdirection with a length that fits the layer: mean of (h_l(f) − β·‖h_l^ref(f)‖·u)².

    ‖h_l^ref(f)‖ is the mean length of the item's own states before unlearning, so that no item depends on another
    (published code takes it from the first batch). u is drawn as for `steer`.

    Args:
        hidden: h_l, output of decoder block l, [B, A, D].
        reference_hidden: the same of the model before unlearning.
        mask: true at answer tokens, [B, A].
        scale: β ≥ 0.
        layer: l, number of the block from 1, or a share of the depth below 1.
        seed: of u.
        weight: factor γ of the term.
    """
    lengths_B = (reference_hidden.norm(dim=-1) * mask).sum(1) / mask.sum(1)
    goal_BD = scale * lengths_B[:, None] * _direction(hidden, seed)
    return weight * _mean_square(hidden - goal_BD[:, None], mask)


@register("objective", role="forget", source="arXiv 2406.04313 (representation rerouting) and its published code")
def reroute(
    hidden: Tensor, reference_hidden: Tensor, mask: Tensor, *, layer: float = 0.33, weight: float = 1.0
) -> Tensor:
    """Representation rerouting: mean over answer tokens of max(0, cos(h_l(f), h_l^ref(f))), 0..1; 1 at the reference.

    What the model makes of the forget items is turned until it is at a right angle to what it made of them before, and
    no further. A part of `circuit_breakers`.

    Args:
        hidden: h_l, output of decoder block l, [B, A, D].
        reference_hidden: the same of the model before unlearning.
        mask: true at answer tokens, [B, A].
        layer: l, number of the block from 1, or a share of the depth below 1.
        weight: factor γ of the term.
    """
    cosines_BA = functional.cosine_similarity(hidden, reference_hidden, dim=-1)
    return weight * (cosines_BA.relu() * mask).sum(1) / mask.sum(1)


@register("objective", role="retain", source="arXiv 2403.03218 (RMU)")
def hidden(
    hidden: Tensor, reference_hidden: Tensor, mask: Tensor, *, layer: float = 0.25, weight: float = 1.0
) -> Tensor:
    """Keep the hidden states: mean of (h_l(r) − h_l^ref(r))², ≥ 0, 0 where nothing changed.

    Args:
        hidden: h_l, output of decoder block l, [B, A, D].
        reference_hidden: the same of the model before unlearning.
        mask: true at answer tokens, [B, A].
        layer: l, number of the block from 1, or a share of the depth below 1.
        weight: factor α of the term.
    """
    return weight * _mean_square(hidden - reference_hidden, mask)


def _direction(hidden_BAD: Tensor, seed: int) -> Tensor:
    """Return u [D], |u| = 1: made on the CPU, so that every device has the same one."""
    random_D = torch.rand(hidden_BAD.shape[-1], generator=torch.Generator().manual_seed(seed))
    return (random_D / random_D.norm()).to(hidden_BAD)


def _mean_square(differences_BAD: Tensor, mask_BA: Tensor) -> Tensor:
    """Return the mean over answer tokens and features, [B]."""
    return (differences_BAD.square().mean(-1) * mask_BA).sum(1) / mask_BA.sum(1)
