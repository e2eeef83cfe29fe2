"""The only walk over a model's layers: put a quantized form in place, measure, restore."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stillknows.errors import UserError
from stillknows.models import linears
from stillknows.registry import Bound, bind


class Quantized(NamedTuple):
    """A weight matrix in a format: the values that it stands for, [O, I] in the input's type, and the codes kept,
    [O, I] int32. Two weights with equal codes in equal blocks cannot be told apart up to the block's scale."""

    values_OI: Tensor
    codes_OI: Tensor


class Damage(NamedTuple):
    """What a format leaves of an update, over all quantized weights.

    crossing: share of weights whose code changed, 0..1.
    surviving: ⟨Q(θu) − Q(θo), θu − θo⟩ / ‖θu − θo‖²; 1 carried over on average, 0 erased; None without an update.
    weights: how many there are.
    """

    crossing: float
    surviving: float | None
    weights: int


def parse_variant(spec: str) -> tuple[Bound, ...]:
    """Parse "rtn:bits=4" or a chain "bf16+rtn:bits=4", applied from left to right. Raises UserError."""
    return tuple(bind("quantizer", part) for part in spec.split("+"))


def quantize(weight_OI: Tensor, chain: tuple[Bound, ...]) -> Quantized:
    """Apply a chain to one matrix in float32; the codes are the last link's."""
    result = Quantized(weight_OI.float(), torch.zeros_like(weight_OI, dtype=torch.int32))
    for link in chain:
        result = link(weight_OI=result.values_OI)
    return Quantized(result.values_OI.to(weight_OI.dtype), result.codes_OI)


@torch.no_grad()
def check(model: nn.Module, chain: tuple[Bound, ...], name: str) -> None:
    """Raise UserError when a layer's shape does not allow the format. Looks at shapes only; needs no weights."""
    for layer in linears(model):
        outputs, inputs = layer.read().shape
        try:
            quantize(torch.zeros(1, inputs), chain)
        except UserError as error:
            raise UserError(f"{name}: layer {layer.name} {(outputs, inputs)}: {error}") from error


@contextlib.contextmanager
def compressed(model: nn.Module, chain: tuple[Bound, ...]) -> Iterator[None]:
    """Run a block with the model's linear layers quantized in place; afterwards they are as before, bit by bit."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in linears(model):
                weight_OI = layer.read()
                quantized = quantize(weight_OI, chain)
                kept.append((weight_OI, weight_OI.clone()))
                layer.write(quantized.values_OI)
        yield
    finally:
        with torch.no_grad():
            for weight_OI, original_OI in kept:
                weight_OI.copy_(original_OI)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the weights that formats apply to, [O, I] each, on the CPU."""
    return {layer.name: layer.read().detach().to("cpu", copy=True) for layer in linears(model)}


@torch.no_grad()
def surviving_update(model: nn.Module, original: Mapping[str, Tensor], chain: tuple[Bound, ...]) -> Damage:
    """Compare a model with the original's `weights` under a format, without a forward pass."""
    crossed = total = 0
    dot = square = 0.0
    for layer in linears(model):
        now_OI, before_OI = layer.read().float(), original[layer.name].to(layer.read().device).float()
        quantized, quantized_before = quantize(now_OI, chain), quantize(before_OI, chain)
        update_OI = now_OI - before_OI
        crossed += int((quantized.codes_OI != quantized_before.codes_OI).sum())
        total += update_OI.numel()
        dot += float(((quantized.values_OI - quantized_before.values_OI) * update_OI).double().sum())
        square += float(update_OI.double().square().sum())
    return Damage(crossed / total, dot / square if square else None, total)
