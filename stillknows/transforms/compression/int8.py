"""8 bits per row, as LLM.int8() stores weights."""

from __future__ import annotations

from stillknows.lazy import Tensor, torch
from stillknows.registry import register
from stillknows.transforms.compression.parts import largest, parts
from stillknows.variants.compress import Quantized, Stored

TINY = 2.0**-118  # 127 over this is still finite in float32


@register("transform", role="deployment", source="arXiv 2208.07339 (weights only)")
def int8(weight_OI: Tensor) -> Quantized:
    """Vector-wise int8: each row is rounded to 127 steps either side of 0, Δ = max|w|/127.

    This is what LLM.int8() keeps of weights in 16 bits; it casts others to float16 first, which is `fp16+int8`.
    `int8+int8_activations` takes the activations as it does, too.
    """
    scale_O1 = largest(weight_OI).clamp_min(TINY)
    values_OI, codes_OI = torch.empty_like(weight_OI), torch.empty_like(weight_OI, dtype=torch.int8)
    for weights, scales, values, codes in parts(weight_OI, scale_O1, values_OI, codes_OI):
        whole = (weights * (127 / scales)).round_()
        codes.copy_(whole)
        torch.mul(whole, scales, out=values).div_(127)
    return Quantized(values_OI, codes_OI, Stored("llm.int8", {"largest": scale_O1[:, 0]}))
