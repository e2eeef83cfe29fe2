"""Floating-point formats of 8 and 4 bits, with a scale per matrix, per channel or per block."""

from __future__ import annotations

from typing import Literal

from stillknows.errors import UserError
from stillknows.lazy import Tensor, functional, torch
from stillknows.registry import register
from stillknows.variants.compress import Quantized, Stored

TINY = 2.0**-126  # the least normal number in float32
E4M3_MAX = 448.0
TILE = 128  # side of the square blocks of fp8:scale=block
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of a 4-bit float
E2M1_MAX = E2M1[-1]
E8M0_LEAST = 2.0**-127  # the lowest power of two that a block can share
MX_BLOCK, NV_BLOCK = 32, 16


@register(
    "transform",
    role="deployment",
    source="compressed-tensors FP8 (W8A16); blocks of 128 × 128 as in arXiv 2412.19437 (DeepSeek-V3)",
)
def fp8(weight_OI: Tensor, *, scale: Literal["tensor", "channel", "block"] = "channel") -> Quantized:
    """8-bit float E4M3 (4 exponent, 3 mantissa bits, largest 448): w is Δ times the nearest value, Δ = max|w|/448.

    Args:
        weight_OI: weights [O, I].
        scale: weights that share Δ (float32): "tensor" all of them, "channel" an output, "block" 128 × 128 of them,
            fewer at the edges.

    The error is at most |w|/16, below |w| = Δ/64 at most Δ/1024. Codes are the ranks of the values, −126..126.
    """
    step = _largest(weight_OI, scale).div(E4M3_MAX).clamp_min(TINY)
    stored_OI = _e4m3(weight_OI / step)
    bits_OI = stored_OI.view(torch.uint8).int()
    ranks_OI = bits_OI & 0x7F
    codes_OI = torch.where(bits_OI > 0x7F, -ranks_OI, ranks_OI)
    stored = Stored("fp8", {"scale": step[::TILE, ::TILE] if scale == "block" else step})
    return Quantized(stored_OI.float() * step, codes_OI, stored)


@register(
    "transform",
    role="deployment",
    source="OCP Microscaling Formats (MX) Specification 1.0, MXFP4; scale=even as compressed-tensors",
)
def mxfp4(weight_OI: Tensor, *, scale: Literal["floor", "even"] = "floor") -> Quantized:
    """4-bit float E2M1 (±0, ½, 1, 1½, 2, 3, 4, 6) in blocks of 32 inputs that share a power of two, E8M0.

    Args:
        weight_OI: weights [O, I].
        scale: exponent of the power of two, at least −127. "floor": ⌊log2 max|w|⌋ − 2 as the specification proposes, so
            that the largest weight lies in 4..8 and what is beyond 6 is cut; "even": one more where max|w| is 1¾ times
            a power of two or above, so that less is cut.

    Rounds half-way cases to the even mantissa. A block with an infinity or a NaN is NaN. Codes are the ranks of the
    values, −7..7. Raises UserError when 32 does not divide I.
    """
    blocks = _in_blocks(weight_OI, MX_BLOCK, "mxfp4")
    largest = blocks.abs().amax(-1, keepdim=True)
    mantissa = torch.frexp(largest).mantissa.where(largest > 0, 1.0)  # ½ to 1 times a power of two; infinite as it is
    step = largest / (8 * mantissa)  # exact, where a power of two by its exponent need not be
    if scale == "even":
        step = step * (1 + (mantissa >= 0.875).float())
    step = step.clamp_min(E8M0_LEAST)
    return _e2m1(blocks, step, weight_OI)._replace(stored=Stored("mxfp4", {"scale": step[..., 0]}))


@register("transform", role="deployment", source="NVIDIA NVFP4, as compressed-tensors stores it (NVFP4A16)")
def nvfp4(weight_OI: Tensor) -> Quantized:
    """4-bit float E2M1 in blocks of 16 inputs with an 8-bit scale E4M3, over one float32 scale of the matrix.

    With g = 448·6/max|w| of the matrix, a block has s = E4M3(g·max|w|/6) and stands for s/g times ±0, ½, 1, 1½, 2, 3, 4
    or 6. A block whose s rounds to 0 (max|w| below 2·10⁻⁶ of the matrix's) is 0; so is all where g is beyond float32.
    Codes are the ranks of the values, −7..7. Raises UserError when 16 does not divide I.

    g is that of the one matrix. llm-compressor gives matrices that engines fuse (query, key and value; gate and up) the
    g of the largest of them.
    """
    return in_nvfp4(weight_OI, weight_OI.abs().amax())


def in_nvfp4(weight_OI: Tensor, most: Tensor) -> Quantized:
    """Round to nvfp4 with g = 448·6/most; `most` broadcasts to [O, blocks, 1]."""
    blocks = _in_blocks(weight_OI, NV_BLOCK, "nvfp4")
    global_scale = E4M3_MAX * E2M1_MAX / most
    global_scale = global_scale.where(global_scale < torch.inf, 1.0)
    per_block = _e4m3(global_scale * (blocks.abs().amax(-1, keepdim=True) / E2M1_MAX)).float()
    stored = Stored("nvfp4", {"scale": per_block[..., 0], "global_scale": global_scale})
    return _e2m1(blocks, per_block / global_scale, weight_OI)._replace(stored=stored)


def _largest(weight_OI: Tensor, scale: str) -> Tensor:
    """Return max|w| of the weights that share a scale, in a shape that broadcasts to [O, I]."""
    magnitudes_OI = weight_OI.abs()
    if scale == "tensor":
        return magnitudes_OI.amax()
    if scale == "channel":
        return magnitudes_OI.amax(1, keepdim=True)
    outputs, inputs = weight_OI.shape
    padded = functional.pad(magnitudes_OI, (0, -inputs % TILE, 0, -outputs % TILE))
    tiles = padded.reshape(len(padded) // TILE, TILE, -1, TILE).amax((1, 3))
    return tiles.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[:outputs, :inputs]


def _e4m3(x: Tensor) -> Tensor:
    """Round to the nearest 8-bit float, half-way cases to even; clamped, since not every version of torch saturates."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _e2m1(blocks: Tensor, step: Tensor, weight_OI: Tensor) -> Quantized:
    """Round to the nearest 4-bit float times the step, half-way cases to the even mantissa; a step of 0 gives 0."""
    scaled = blocks / step.where(step != 0, torch.inf)
    magnitudes = scaled.abs().clamp_max(E2M1_MAX)
    spacing = 0.5 * (1 + (magnitudes >= 2).float() + 2 * (magnitudes >= 4).float())  # ½ below 2, 1 below 4, then 2
    magnitudes = torch.round(magnitudes / spacing) * spacing
    ranks = torch.bucketize(magnitudes, torch.tensor(E2M1, device=blocks.device)) * scaled.sign()
    values = magnitudes * scaled.sign() * step
    return Quantized(values.reshape(weight_OI.shape), ranks.reshape(weight_OI.shape).int())


def _in_blocks(weight_OI: Tensor, size: int, name: str) -> Tensor:
    outputs, inputs = weight_OI.shape
    if inputs % size:
        raise UserError(
            f"{name}: its blocks of {size} do not divide {inputs} inputs",
            "use fp8, or rtn with a group that divides them",
        )
    return weight_OI.contiguous().reshape(outputs, inputs // size, size)
