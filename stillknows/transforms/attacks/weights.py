"""Changes to the weights that need no data: what was hidden narrowly does not survive them, what was learned does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from stillknows.lazy import Tensor, nn, torch
from stillknows.model.parameters import update
from stillknows.registry import Limits, register


@register("transform", role="attack", budget="scale", source="arXiv 2412.01784 (noise injection)")
def noise(model: nn.Module, *, scale: Annotated[float, Limits(0)] = 0.1, seed: int = 0) -> None:
    """Add Gaussian noise to every matrix: W ← W + scale·rms(W)·N(0, 1). Norms and biases stay as they are.

    The controls get the same noise, number by number, at the scale of their own matrices.

    Args:
        scale: the noise's size relative to the root mean square of the matrix; 0 leaves the model as it is.
        seed: of the noise.
    """
    drawn = gaussian(seed)
    update(model, lambda _, weight: weight if weight.dim() < 2 else weight + scale * drawn(weight))


def gaussian(seed: int) -> Callable[[Tensor], Tensor]:
    """Return f(matrix): N(0, 1) at the root mean square of the matrix, drawn anew at each call."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(weight: Tensor) -> Tensor:
        return torch.randn(weight.shape, generator=generator).to(weight) * weight.float().square().mean().sqrt()

    return drawn
