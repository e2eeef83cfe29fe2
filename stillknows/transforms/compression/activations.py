"""Formats of activations: what a linear map is given, rounded token by token, with scales made as the model runs.

They are chained with a format of the weights: `int8+int8_activations` is LLM.int8(), `fp8+fp8_activations` W8A8.
"""

from __future__ import annotations

from typing import Annotated, Literal

from stillknows.lazy import Tensor, torch
from stillknows.registry import Limits, register
from stillknows.transforms.compression.floating import fp8, in_nvfp4, mxfp4
from stillknows.transforms.compression.int8 import int8

FLOAT16_MAX = 65504.0


@register("transform", role="deployment", source="arXiv 2208.07339 (LLM.int8()), as bitsandbytes rounds activations")
def int8_activations(activations_TI: Tensor, *, threshold: Annotated[float, Limits(0)] = 6.0) -> Tensor:
    """Inputs of linear maps in 8 bits: each token is rounded to 127 steps either side of 0, its outliers are kept.

    Args:
        activations_TI: inputs [T, I], a token per row.
        threshold: |x| from which on an input is an outlier: it stays as it is and does not count for Δ = max|x|/127.
            0 for no outliers, which is W8A8 with one dynamic scale per token (arXiv 2211.10438).

    Rounded from float16, as bitsandbytes does, and equal to it one token at a time, as in decoding. Of a longer input
    it keeps, for every token, all inputs at which any token of the batch has an outlier; here, what a model says of a
    token never depends on later tokens or on who shares its batch.
    """
    x_TI = activations_TI.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()
    is_outlier_TI = x_TI.abs() >= (threshold or torch.inf)
    return activations_TI.where(is_outlier_TI, int8(x_TI.masked_fill(is_outlier_TI, 0.0)).values_OI)


@register("transform", role="deployment", source="compressed-tensors FP8_DYNAMIC (W8A8)")
def fp8_activations(activations_TI: Tensor) -> Tensor:
    """Inputs of linear maps as 8-bit floats E4M3 with one scale per token, Δ = max|x|/448; see fp8.

    Args:
        activations_TI: inputs [T, I], a token per row.
    """
    return fp8(activations_TI).values_OI


@register(
    "transform",
    role="deployment",
    source="OCP Microscaling Formats (MX) Specification 1.0, MXFP4; scale=even as compressed-tensors",
)
def mxfp4_activations(activations_TI: Tensor, *, scale: Literal["floor", "even"] = "floor") -> Tensor:
    """Inputs of linear maps as 4-bit floats in blocks of 32 that share a power of two; see mxfp4.

    Args:
        activations_TI: inputs [T, I], a token per row.
        scale: exponent of the power of two.

    Raises UserError when 32 does not divide I.
    """
    return mxfp4(activations_TI, scale=scale).values_OI


@register("transform", role="deployment", source="NVIDIA NVFP4 as in compressed-tensors (W4A4), with g of each token")
def nvfp4_activations(activations_TI: Tensor) -> Tensor:
    """Inputs of linear maps as 4-bit floats in blocks of 16 with an 8-bit scale each; see nvfp4.

    Args:
        activations_TI: inputs [T, I], a token per row.

    g = 448·6/max|x| of the token. Deployed files hold one g per layer, from calibration; scales of blocks are then
    rounded at other places, by up to 1/16 as here. Raises UserError when 16 does not divide I.
    """
    return in_nvfp4(activations_TI, activations_TI.abs().amax(1)[:, None, None]).values_OI
