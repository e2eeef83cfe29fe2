"""Optimizers in place of AdamW. What they keep for a parameter are tensors, so that checkpoints hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from stillknows.lazy import nn, torch
from stillknows.registry import Limits, register


@register(
    "step",
    role="optimizer",
    source="arXiv 2305.14342 (Sophia-G); for unlearning arXiv 2404.18239 (SOUL), its configurations",
)
def sophia(
    parameters: Sequence[nn.Parameter],
    lr: float,
    *,
    beta1: Annotated[float, Limits(0, 1, below=True)] = 0.9,
    beta2: Annotated[float, Limits(0, 1, below=True)] = 0.95,
    rho: Annotated[float, Limits(0, above=True)] = 0.04,
    tokens: Annotated[int, Limits(1)] = 5120,
    decay: Annotated[float, Limits(0)] = 0.1,
) -> torch.optim.Optimizer:
    """Clipped second-order steps: θ ← (1 − η·λ)·θ − η·clip(m/(ρ·B·h), ±1), with averages m of g and h of g².

    B·h estimates the diagonal of the Hessian (Gauss-Newton-Bartlett). Sophia takes it from answers that the model
    samples, in passes of their own; SOUL's code from the gradient of the step itself, and so does this. Published with
    learning rates of 5e-6 and 1e-5. Averages start at 0 and are not corrected for that. The square of a gradient is at
    most the square of `--clip`.

    Args:
        beta1: decay of m, 0 ≤ β < 1.
        beta2: decay of h, 0 ≤ β < 1.
        rho: ρ > 0, how many weights are clipped: fewer, the larger it is.
        tokens: B ≥ 1, the published code's default.
        decay: λ ≥ 0, of matrices.
    """
    from stillknows.methods.steps.clipped_steps import Sophia

    return Sophia(parameters, lr=lr, beta1=beta1, beta2=beta2, rho=rho, tokens=tokens, decay=decay)
