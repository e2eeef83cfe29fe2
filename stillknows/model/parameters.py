"""A model's parameters as values: copied, written back, and put back after a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from stillknows.lazy import Tensor, nn, no_grad

Weights = Mapping[str, Tensor]  # by name, of all parameters


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@no_grad
def write(model: nn.Module, weights: Weights) -> None:
    """Set every parameter to the value of its name, bit by bit. Raises KeyError for a name that is missing."""
    for name, p in model.named_parameters():
        p.copy_(weights[name])


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Run a block with copies of the parameters; afterwards every one is as before, bit by bit."""
    before = copies(model)
    try:
        yield before
    finally:
        write(model, before)
