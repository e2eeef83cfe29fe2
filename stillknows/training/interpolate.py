"""Interpolation between two states of a model, and the point at which methods are compared fairly."""

from __future__ import annotations

from collections.abc import Callable

from stillknows.lazy import nn, torch
from stillknows.model.parameters import Weights, copies, update

COARSE_STEPS = 16  # shares α that are tried first, from 1 downwards
BISECTIONS = 4  # of the last coarse step


def mix(model: nn.Module, original: Weights, unlearned: Weights, alpha: float) -> None:
    """Set a model's weights to (1 − α)·θo + α·θu: bit by bit θo at α = 0 and θu at α = 1."""
    update(model, lambda name, p: torch.lerp(original[name].to(p), unlearned[name].to(p), alpha))


def largest_share(is_good: Callable[[float], bool]) -> float:
    """Return the largest share α in 0..1 that is found to be good, to within 1/256.

    Looks from 1 downwards in steps of 1/16, as a score need not fall evenly, and halves the last step. 0 is good.
    """
    for part in range(COARSE_STEPS, 0, -1):
        if is_good(part / COARSE_STEPS):
            break
    else:
        part = 0
    good, width = part / COARSE_STEPS, 1 / COARSE_STEPS
    if part == COARSE_STEPS:
        return good
    for _ in range(BISECTIONS):
        width /= 2
        good += width if is_good(good + width) else 0
    return good


def calibrate(model: nn.Module, original: Weights, score: Callable[[], float], floor: float) -> float:
    """Interpolate a model towards its original, in place, until it keeps a score; return the share α in 0..1.

    The fair comparison of arXiv 2406.09179 (UWC): every method is interpolated to the largest α with
    score(θ(α)) ≥ floor·score(θo), and only then is it measured what it has forgotten.

    Args:
        model: θu on entry, θ(α) afterwards.
        original: θo.
        score: of the model as it is at the call, higher is better, for example of what is to be retained.
        floor: share of the original's score that is kept, 0..1.
    """
    unlearned = copies(model)
    mix(model, original, unlearned, 0)
    least = floor * score()

    def is_good(alpha: float) -> bool:
        mix(model, original, unlearned, alpha)
        return score() >= least

    alpha = largest_share(is_good)
    mix(model, original, unlearned, alpha)
    return alpha
