"""Formats without blocks: the weights as they are, and in 16 bits."""

from __future__ import annotations

from stillknows.lazy import Tensor, torch
from stillknows.registry import register
from stillknows.variants.compress import Quantized


@register("transform", role="deployment", source="identity")
def full(weight_OI: Tensor) -> Quantized:
    """The weights as the checkpoint holds them: the variant that every other is compared with."""
    return Quantized(weight_OI, weight_OI.contiguous().view(torch.int32))


@register("transform", role="deployment", source="IEEE 754 round to nearest even, 8 significant bits")
def bf16(weight_OI: Tensor) -> Quantized:
    """Cast to bfloat16, as most checkpoints are published."""
    cast_OI = weight_OI.bfloat16()
    return Quantized(cast_OI.to(weight_OI.dtype), cast_OI.view(torch.int16).int())


@register("transform", role="deployment", source="IEEE 754 binary16")
def fp16(weight_OI: Tensor) -> Quantized:
    """Cast to float16; values beyond ±65504 are clamped, since infinity would end the model."""
    cast_OI = weight_OI.clamp(-65504, 65504).half()
    return Quantized(cast_OI.to(weight_OI.dtype), cast_OI.view(torch.int16).int())
