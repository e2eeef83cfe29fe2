"""Round to nearest on an even grid: per tensor, per output channel, or per group of inputs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stillknows.compress import Quantized
from stillknows.errors import UserError
from stillknows.registry import register

TINY = torch.finfo(torch.float32).tiny


@register("quantizer", source="arXiv 2410.16454, Eq. 2; grids of compressed-tensors and of the paper as options")
def rtn(
    weight_OI: Tensor,
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    grid: Literal["restricted", "full", "paper"] = "restricted",
) -> Quantized:
    """Round to nearest: Q(w) = Δ·clamp(round(w/Δ) + z) − Δ·z, one Δ (and z) per group.

    Args:
        weight_OI: weights [O, I].
        bits: N, 2..8.
        group: inputs that share a scale; 0 for one scale per output channel, −1 for one scale per tensor.
        symmetric: z = 0 and Δ from max|w|; otherwise Δ = (max − min)/(2^N − 1), the range including 0.
        grid: Δ of the symmetric form. "restricted": max|w|/(2^(N−1) − 1), codes symmetric about 0; "full":
            max|w|/((2^N − 1)/2), codes −2^(N−1)..2^(N−1) − 1, as compressed-tensors stores them; "paper":
            max|w|/2^(N−1) as in Eq. 2, whose largest code does not exist and is clamped.

    The error is at most Δ/2 per weight ("paper": Δ at the largest positive weight). Raises UserError when `group` does
    not divide I or `bits` is out of range.
    """
    if not 2 <= bits <= 8:
        raise UserError(f"rtn: bits={bits} is not in 2..8")
    blocks = _blocks(weight_OI, group)
    half = 2 ** (bits - 1)
    if symmetric:
        divisor = {"restricted": half - 1, "full": (2 * half - 1) / 2, "paper": half}[grid]
        step = blocks.abs().amax(-1, keepdim=True).div(divisor).clamp_min(TINY)
        low = -half + 1 if grid == "restricted" else -half
        codes = torch.round(blocks / step).clamp(low, half - 1)
        values = codes * step
    else:
        least, most = blocks.amin(-1, keepdim=True).clamp_max(0), blocks.amax(-1, keepdim=True).clamp_min(0)
        step = (most - least).div(2 * half - 1).clamp_min(TINY)
        zero = torch.round(-half - least / step).clamp(-half, half - 1)
        codes = (torch.round(blocks / step) + zero).clamp(-half, half - 1)
        values = (codes - zero) * step
    return Quantized(values.reshape(weight_OI.shape), codes.reshape(weight_OI.shape).int())


@register("quantizer", source="rtn with its default options")
def int4(weight_OI: Tensor) -> Quantized:
    """Symmetric round to nearest in 4 bits, groups of 128; rtn:grid=full is compressed-tensors' grid of it."""
    return rtn(weight_OI)


def _blocks(weight_OI: Tensor, group: int) -> Tensor:
    outputs, inputs = weight_OI.shape
    if group == -1:
        return weight_OI.reshape(1, 1, -1)
    if group == 0:
        return weight_OI.reshape(outputs, 1, inputs)
    if group < 0 or inputs % group:
        raise UserError(
            f"rtn: groups of {group} do not divide {inputs} inputs", "use group=0 (per channel) or a divisor"
        )
    return weight_OI.reshape(outputs, inputs // group, group)
