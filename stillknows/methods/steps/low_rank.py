"""What an adapter of low rank adds to a weight, as a module of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """W + (α/r)·B·A, with B = 0 at the start; [O, I], or [I, O] for a transposed map."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        bound = columns**-0.5
        start = (2 * torch.rand(rank, columns, generator=generator) - 1) * bound
        self.a = nn.Parameter(start.to(weight))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.b @ self.a
