"""Parameters as values: copied, set, moved, and put back after a block. Nothing else writes into a model's weights but
`layers.Linear` (one matrix, as [O, I]) and optimizers."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
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


class Snapshot(Mapping[str, "Tensor"]):
    """Parameters as they were, by name: in a temporary file, so that they take no memory. Read one by one, on the CPU.

    The file lies in `folder`, None for where the system keeps temporary ones, and is gone when this object is.
    """

    def __init__(self, parameters: Parameters, folder: Path | None = None) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        self.places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        for name, p in named(parameters).items():
            self.places[name] = self.file.tell(), p.dtype, p.shape
            self.file.write(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __getitem__(self, name: str) -> Tensor:
        place, dtype, shape = self.places[name]
        self.file.seek(place)
        content = bytearray(self.file.read(shape.numel() * dtype.itemsize))
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


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
def restored(parameters: Parameters, before: Weights | None = None) -> Iterator[Weights]:
    """Run a block with copies of the parameters, or those that are given; afterwards every one is as before, bit by
    bit."""
    before = copies(parameters) if before is None else before
    try:
        yield before
    finally:
        write(parameters, before)
