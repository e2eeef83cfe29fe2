"""Sophia as an optimizer of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

TINY = 1e-15  # keeps the quotient finite where the curvature is 0


class Sophia(torch.optim.Optimizer):
    """θ ← (1 − η·λ)·θ − η·clip(m/(ρ·B·h), ±1); see `sophia`. Vectors are not decayed."""

    def __init__(self, params: Sequence[nn.Parameter], **how: float) -> None:
        super().__init__(params, how)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)

    def _move(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[p]
        for slot in ("average", "curvature"):
            if slot not in state:
                state[slot] = torch.zeros_like(p)
        state["average"].lerp_(p.grad, 1 - group["beta1"])
        state["curvature"].mul_(group["beta2"]).addcmul_(p.grad, p.grad, value=1 - group["beta2"])
        if p.dim() > 1:
            p.mul_(1 - group["lr"] * group["decay"])
        scale = group["rho"] * group["tokens"] * state["curvature"] + TINY
        p.add_((state["average"] / scale).clamp_(-1, 1), alpha=-group["lr"])
