"""4-bit formats with a fixed table of 16 values per block of 64 weights, scaled by the block's largest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from stillknows.compress import Quantized
from stillknows.registry import register

BLOCK = 64
TINY = torch.finfo(torch.float32).tiny
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_POSITIVE = (0.005208333333, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0)
FP4 = (*(-v for v in reversed(_FP4_POSITIVE)), 0.0, *_FP4_POSITIVE)


@register("quantizer", source="arXiv 2305.14314; bitsandbytes nf4, block 64, no double quantization")
def nf4(weight_OI: Tensor) -> Quantized:
    """4-bit NormalFloat: each block of 64 is its largest magnitude times the nearest of 16 normal quantiles."""
    return _nearest(weight_OI, NF4)


@register("quantizer", source="bitsandbytes fp4, block 64: what load_in_4bit=True alone gives")
def fp4(weight_OI: Tensor) -> Quantized:
    """4-bit float (1 sign, 2 exponent, 1 mantissa bit): a block of 64 is its largest magnitude times 1 of 15 values."""
    return _nearest(weight_OI, FP4)


def _nearest(weight_OI: Tensor, table: tuple[float, ...]) -> Quantized:
    book = torch.tensor(table, dtype=torch.float32, device=weight_OI.device)
    flat = weight_OI.reshape(-1)
    blocks = pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(TINY)
    codes = torch.bucketize((blocks / scale).contiguous(), (book[1:] + book[:-1]) / 2)
    values = book[codes] * scale
    keep = slice(0, len(flat))
    return Quantized(
        values.reshape(-1)[keep].reshape(weight_OI.shape), codes.reshape(-1)[keep].reshape(weight_OI.shape).int()
    )
