"""Combinations: how the forget and the retain gradient become one.

`state` is kept between steps and saved with a run's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Annotated

from stillknows.lazy import Tensor, torch
from stillknows.registry import Limits, register


@register("step", role="gradient_merge", source="arXiv 2503.09117; γ of its published code", version=2)
def gru(
    forget_gradients: Mapping[str, Tensor],
    retain_gradients: Mapping[str, Tensor],
    state: MutableMapping[str, Tensor],
    *,
    gamma: Annotated[float, Limits(0, 1, above=True)] = 0.8,
) -> dict[str, Tensor]:
    """Gradient rectified unlearning: where ⟨g_f, ḡ⟩ < 0, g_f loses its part along ḡ; then g_r is added.

    ḡ ← γ·g_r + (1 − γ)·ḡ, from 0, is the retain gradient without the noise of one batch;
    g_f ← g_f − ⟨g_f, ḡ⟩/‖ḡ‖²·ḡ, with inner products over all trained weights. Published code descends the rectified
    g_f alone and uses the retain items for ḡ only.

    Args:
        gamma: γ, 0 < γ ≤ 1; 1 for the gradient of the step's batch.
    """
    average = _averaged(state, retain_gradients, 1 - gamma)
    dot = torch.stack([(forget_gradients[name] * g).sum() for name, g in average.items()]).sum()
    square = torch.stack([g.square().sum() for g in average.values()]).sum()
    back = torch.where((dot < 0) & (square > 0), dot / square, torch.zeros_like(dot))
    return {name: forget_gradients[name] - back * average[name] + g for name, g in retain_gradients.items()}


@register("step", role="gradient_merge", source="arXiv 2506.12484 (the mask of MUDMAN)")
def disruption(
    forget_gradients: Mapping[str, Tensor],
    retain_gradients: Mapping[str, Tensor],
    state: MutableMapping[str, Tensor],
    *,
    momentum: Annotated[float, Limits(0, 1, below=True)] = 0.9,
) -> dict[str, Tensor]:
    """Disruption masking: forgetting moves a weight only where retaining would move it the same way.

    1[sign g_f = sign ḡ]·g_f + g_r, with ḡ ← m·ḡ + (1 − m)·g_r from 0. The rest of MUDMAN, a forget gradient of length 1
    and an adversary that relearns meanwhile, is not a part of this.

    Args:
        momentum: m, 0 ≤ m < 1; 0 for the gradient of the step's batch.
    """
    average = _averaged(state, retain_gradients, momentum)
    return {
        name: torch.where(g.sign() == average[name].sign(), g, 0) + retain_gradients[name]
        for name, g in forget_gradients.items()
    }


@register("step", role="gradient_merge", source="arXiv 2506.05314 (PDU)")
def dual(
    forget_gradients: Mapping[str, Tensor],
    retain_gradients: Mapping[str, Tensor],
    retain_loss: float,
    state: MutableMapping[str, Tensor],
    *,
    epsilon: float = 0.3,
    eta: Annotated[float, Limits(0, above=True)] = 1.0,
    start: Annotated[float, Limits(0)] = 1.0,
) -> dict[str, Tensor]:
    """Retaining as a constraint: descend L_forget + λ·(L_retain − ε), then λ ← max(0, λ + η·(L_retain − ε)).

    Args:
        epsilon: ε, the loss that the retain terms may reach. Published: 0.3 on TOFU, 1.5 and 0.1 on MUSE; somewhat
            above the loss before unlearning.
        eta: η > 0, step size of λ. Published: 1 and 5.
        start: λ in the first step, ≥ 0. Published: 50 or 100 beside a forget loss that is a square of logits.
    """
    multiplier = float(state.get("multiplier", start))
    state["multiplier"] = torch.tensor(max(0.0, multiplier + eta * (retain_loss - epsilon)), dtype=torch.float64)
    return {name: forget_gradients[name] + multiplier * g for name, g in retain_gradients.items()}


def _averaged(
    state: MutableMapping[str, Tensor], gradients: Mapping[str, Tensor], momentum: float
) -> Mapping[str, Tensor]:
    """Return the moving average of the gradients, from 0, and keep it where it reaches further than this step."""
    if not momentum:
        return gradients
    for name, g in gradients.items():
        before = state[name].to(g) if name in state else torch.zeros_like(g)
        state[name] = momentum * before + (1 - momentum) * g
    return {name: state[name] for name in gradients}
