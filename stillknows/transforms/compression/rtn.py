"""Even grids, and round to nearest on them: per tensor, per output channel, or per group of inputs."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.registry import Limits, register
from stillknows.transforms.compression.parts import largest, parts
from stillknows.variants.compress import Quantized, Stored

TINY = 2.0**-126  # the least normal number in float32
GridKind = Literal["restricted", "full", "paper"]


class RoundingGrid(NamedTuple):
    """The values Δ·(code − z) of blocks of weights; Δ and z have the blocks' shape with a last axis of 1."""

    step: Tensor
    zero: Tensor
    low: int
    high: int

    @classmethod
    def of(cls, blocks: Tensor, bits: int, symmetric: bool, kind: GridKind) -> RoundingGrid:
        """Return the grid that spans each block; see `rtn` for the options."""
        half = 2 ** (bits - 1)
        if symmetric:
            divisor = {"restricted": half - 1, "full": (2 * half - 1) / 2, "paper": half}[kind]
            step = largest(blocks).div(divisor).clamp_min(TINY)
            return cls(step, torch.zeros_like(step), -half + 1 if kind == "restricted" else -half, half - 1)
        least, most = blocks.amin(-1, keepdim=True).clamp_max(0), blocks.amax(-1, keepdim=True).clamp_min(0)
        step = (most - least).div(2 * half - 1).clamp_min(TINY)
        return cls(step, torch.round(-half - least / step).clamp(-half, half - 1), -half, half - 1)

    def stored(self, symmetric: bool) -> Stored:
        """Return how files keep the grid."""
        zero = {} if symmetric else {"zero": self.zero.squeeze(-1)}
        return Stored(f"int{(self.high + 1).bit_length()}", {"scale": self.step.squeeze(-1)} | zero)

    def codes(self, weights: Tensor) -> Tensor:
        """Return the nearest code of each weight, as whole numbers in the weights' type."""
        return (weights / self.step).round_().add_(self.zero).clamp_(self.low, self.high)

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zero).mul_(self.step)


@register(
    "transform",
    role="deployment",
    source="arXiv 2410.16454, Eq. 2; grids of compressed-tensors and of the paper as options",
)
def rtn(
    weight_OI: Tensor,
    *,
    bits: Annotated[int, Limits(2, 8)] = 4,
    group: int = 128,
    symmetric: bool = True,
    grid: GridKind = "restricted",
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
    not divide I.
    """
    blocks = in_blocks(weight_OI, group)
    even = RoundingGrid.of(blocks, bits, symmetric, grid)
    values, codes = torch.empty_like(blocks), torch.empty_like(blocks, dtype=torch.int8)
    for weights, steps, zeros, values_here, codes_here in parts(blocks, even.step, even.zero, values, codes):
        own = even._replace(step=steps, zero=zeros)
        whole = own.codes(weights)
        codes_here.copy_(whole)
        torch.sub(whole, zeros, out=values_here).mul_(steps)
    return Quantized(values.reshape(weight_OI.shape), codes.reshape(weight_OI.shape), even.stored(symmetric))


@register("transform", role="deployment", source="rtn with its default options")
def int4(weight_OI: Tensor, *, group: int = 128) -> Quantized:
    """Symmetric round to nearest in 4 bits, in groups of inputs; rtn:grid=full is compressed-tensors' grid of it.

    Args:
        weight_OI: weights [O, I].
        group: inputs that share a scale; see rtn.
    """
    return rtn(weight_OI, group=group)


def in_blocks(weight_OI: Tensor, group: int) -> Tensor:
    """Return the weights as [blocks of outputs, blocks of inputs, weights of a block]; see `rtn` for `group`."""
    outputs, inputs = weight_OI.shape
    if group == -1:
        return weight_OI.reshape(1, 1, -1)
    if group == 0:
        return weight_OI.reshape(outputs, 1, inputs)
    if group < 0 or inputs % group:
        raise UserError(f"groups of {group} do not divide {inputs} inputs", "use group=0 (per channel) or a divisor")
    return weight_OI.reshape(outputs, inputs // group, group)
