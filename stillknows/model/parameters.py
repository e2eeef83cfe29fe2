"""Parameters as values: copied, set, moved, and put back after a block. Nothing else writes into a model's weights but
`layers.Linear` (one matrix, as [O, I]) and optimizers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from stillknows.lazy import Tensor, nn, no_grad, torch

Weights = Mapping[str, Tensor]  # by name
if TYPE_CHECKING:
    Parameters = nn.Module | Weights  # all of a model's, or those that are named


def named(parameters: Parameters) -> dict[str, Tensor]:
    """Return parameters by name; those that layers share once."""
    return dict(parameters if isinstance(parameters, Mapping) else parameters.named_parameters())


def copies(parameters: Parameters, device: str | None = None) -> dict[str, Tensor]:
    """Return copies by name. device: where they are kept; None for where the parameters are."""
    return {name: p.detach().to(device or p.device, copy=True) for name, p in named(parameters).items()}


def checksums(parameters: Parameters, dtype: torch.dtype) -> dict[str, int]:
    """Return a number for each parameter as `dtype`, float32 or bfloat16, holds it: equal bits, equal number."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    return {
        name: int(p.detach().to(dtype).contiguous().view(bits).sum(dtype=torch.int64))
        for name, p in named(parameters).items()
    }


@no_grad
def update(parameters: Parameters, new: Callable[[str, Tensor], Tensor]) -> None:
    """Set every parameter, in place, to new(name, parameter), which may be of another type or on another device."""
    for name, p in named(parameters).items():
        p.copy_(new(name, p))


def write(parameters: Parameters, weights: Weights) -> None:
    """Set every parameter to the value of its name, bit by bit. Raises KeyError for a name that is missing."""
    update(parameters, lambda name, _: weights[name])


@no_grad
def add(parameters: Parameters, steps: Iterable[tuple[str, Tensor]], scale: float = 1.0) -> None:
    """Move parameters: θ ← θ + scale·step for each (name, step). Raises KeyError for a name that there is not."""
    found = named(parameters)
    for name, step in steps:
        found[name].add_(step.to(found[name]), alpha=scale)


@contextlib.contextmanager
def restored(parameters: Parameters) -> Iterator[dict[str, Tensor]]:
    """Run a block with copies of the parameters; afterwards every one is as before, bit by bit."""
    before = copies(parameters)
    try:
        yield before
    finally:
        write(parameters, before)
