"""Rounding as a function of torch's autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillknows.registry import Bound


class StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is taken to be 1, since its own is 0 almost everywhere."""

    @staticmethod
    def forward(x: Tensor, links: Sequence[Bound], given_as: str) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        for link in links:
            rows = link(**{given_as: rows})
        return rows.to(x.dtype).reshape(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: the gradient passes unchanged."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None
