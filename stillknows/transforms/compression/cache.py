"""Formats of the cache: keys and values of attention, each token's rounded by themselves.

KIVI's scales per channel of the keys (arXiv 2402.02750) are shared by tokens that are still to come, and its latest
tokens are kept whole; what it gives depends on how a text was cut into steps. It has no place among these.
"""

from __future__ import annotations

from typing import Annotated, Literal

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.registry import Limits, register
from stillknows.transforms.compression.floating import E4M3_MAX
from stillknows.transforms.compression.gguf_blocks import TYPES, fill
from stillknows.transforms.compression.rtn import rtn


@register("transform", role="deployment", source="arXiv 2402.02750 (KIVI), values; arXiv 2303.06865 (FlexGen)")
def kv(
    cached_TD: Tensor,
    *,
    bits: Annotated[int, Limits(2, 8)] = 8,
    group: Annotated[int, Limits(0)] = 32,
    symmetric: bool = False,
) -> Tensor:
    """Keys and values on an even grid: round to nearest in groups of a head's numbers, one scale (and zero) per group.

    Args:
        cached_TD: keys after their rotation, or values; [T, D], a head's of a token per row.
        bits: N, 2..8.
        group: numbers that share a scale; 0 for all of a head.
        symmetric: z = 0; see rtn.

    Raises UserError when `group` does not divide D.
    """
    return rtn(cached_TD, bits=bits, group=group, symmetric=symmetric, grid="full").values_OI


@register("transform", role="deployment", source="vLLM, kv_cache_dtype=fp8 without calibration: scales of 1")
def kv_fp8(cached_TD: Tensor) -> Tensor:
    """Keys and values as 8-bit floats E4M3 without a scale: 3 mantissa bits, cut at ±448.

    Args:
        cached_TD: keys after their rotation, or values; [T, D], a head's of a token per row.
    """
    return cached_TD.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


@register("transform", role="deployment", source="llama.cpp, --cache-type-k and --cache-type-v")
def kv_gguf(cached_TD: Tensor, *, type: Literal["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"] = "Q8_0") -> Tensor:
    """Keys and values in blocks of 32 as llama.cpp stores them.

    Args:
        cached_TD: keys after their rotation, or values; [T, D], a head's of a token per row.
        type: block type of both.

    Raises UserError when 32 does not divide D, as llama.cpp refuses it.
    """
    size = TYPES[type].weights
    if cached_TD.shape[1] % size:
        raise UserError(
            f"kv_gguf: blocks of {size} do not divide a head's {cached_TD.shape[1]} numbers", "use kv with group=0"
        )
    return fill(cached_TD.contiguous(), type).values.reshape(cached_TD.shape)
