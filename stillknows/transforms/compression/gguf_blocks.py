"""The block types of ggml, as its reference quantizer fills them when it is given no importance matrix.

A block is a run of weights along a row with scales of its own: 32 weights with one scale, or a super-block of 256 in
sub-blocks of 16 or 32, whose scales are whole numbers times one float16. The order of every float32 operation is
ggml's: sums run from the first weight to the last, so that the stored bytes are equal and not merely close.

Shape letters: N weights of a sub-block, B sub-blocks; [N, B] keeps together the weights of one place in a sub-block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

from stillknows.lazy import Tensor, torch

SUPER = 256
CACHED = 2**18  # weights at once on a processor, whose caches then hold what a search works on
ON_DEVICE = 2**23  # on an accelerator: few launches, and a bound on memory: some ten times as many float32
LEAST_MAGNITUDE = 1e-15  # sub-blocks below this are zeros to ggml where it searches for one scale
ROUNDER = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the low bits


class Blocks(NamedTuple):
    """What blocks store. A weight stands for scale·multiple·code − offset·offset_multiple.

    codes: [blocks, sub-blocks, N], int32, signed: the type's constant shift is taken off.
    multiples, offset_multiples: of each sub-block, [blocks, sub-blocks] int32; ones where a type stores none.
    scale, offset: of each block, [blocks, 1] float32 with float16 values; offset 0 where a type stores none.
    """

    codes: Tensor
    multiples: Tensor
    scale: Tensor
    offset_multiples: Tensor
    offset: Tensor

    @property
    def steps(self) -> Tensor:
        """What one code is worth, [blocks, sub-blocks, 1]; negative where ggml lets the codes fall as weights rise."""
        return (self.scale * self.multiples)[..., None]

    @property
    def values(self) -> Tensor:
        """The weights that the blocks stand for, [blocks, sub-blocks, N]."""
        return self.steps * self.codes - (self.offset * self.offset_multiples)[..., None]


class BlockType(NamedTuple):
    """Weights in a block, and the function [blocks, weights] -> Blocks."""

    weights: int
    fill: Callable[[Tensor], Blocks]


def _by_largest(x: Tensor, *, half: int) -> Blocks:
    """Q4_0, Q5_0: codes −half..half − 1; the weight of the largest magnitude has the code −half, whatever its sign."""
    scale = _ratio(_largest(x, 1)[:, None], -half)
    codes = (x * _inverse(scale) + (half + 0.5)).int().clamp(0, 2 * half - 1) - half
    return _plain(codes, scale)


def _by_range(x: Tensor, *, top: int) -> Blocks:
    """Q4_1, Q5_1: codes 0..top from the least weight to the largest."""
    least, most = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = _ratio(most - least, top)
    codes = ((x - least) * _inverse(scale) + 0.5).int().clamp(0, top)
    return _plain(codes, scale, -least)


def _by_magnitude(x: Tensor) -> Blocks:
    """Q8_0: codes −127..127, halves away from zero."""
    scale = _ratio(x.abs().amax(1, keepdim=True), 127)
    ratio = x * _inverse(scale)
    whole = ratio.abs().floor()
    whole = whole + (ratio.abs() - whole >= 0.5)
    return _plain((whole * ratio.sign()).int(), scale)


def _plain(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Blocks:
    """Blocks that are their own only sub-block."""
    ones = torch.ones_like(codes[:, :1])
    offset = torch.zeros_like(scale) if offset is None else offset
    return Blocks(codes[:, None], ones, _float16(scale), ones, _float16(offset))


def _with_offsets(
    x: Tensor, *, members: int, top: int, levels: int, first: float, tries: int, by_magnitude: bool
) -> Blocks:
    """Q2_K, Q4_K, Q5_K: sub-blocks with a scale and an offset, each a whole number 0..levels of the super-block's.

    Args:
        x: weights [super-blocks, 256].
        members: weights in a sub-block, N.
        top: codes are 0..top.
        levels: multiples are 0..levels.
        first: the first grid that is tried has top + first steps over the range; each next one has 0.1 more.
        tries: grids that are tried besides the plain one.
        by_magnitude: errors are |e| and count |w|; otherwise e² and count |w| + the sub-block's root mean square.
    """
    sub_blocks = SUPER // members
    x_NB = x.reshape(-1, members).T.contiguous()
    importance_NB = x_NB.abs()
    if not by_magnitude:
        mean_B = _sum(x_NB * x_NB) / members
        importance_NB = mean_B.double().sqrt().float() + importance_NB  # torch's float32 root is off by a bit at times
    scale_B, offset_B, codes_NB = _fit_line(x_NB, importance_NB, top, first, tries, by_magnitude)
    scales, offsets = scale_B.reshape(-1, sub_blocks), offset_B.reshape(-1, sub_blocks)
    multiples, scale = _shared(scales, levels)
    offset_multiples, offset = _shared(offsets, levels)
    blocks = Blocks(codes_NB.T.reshape(-1, sub_blocks, members), multiples, scale, offset_multiples, offset)
    shifted = x.reshape(blocks.codes.shape) + (offset * offset_multiples)[..., None]
    return blocks._replace(codes=_recoded(blocks, shifted, 0, top))


def _shared(parts: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Write numbers [super-blocks, sub-blocks] ≥ 0 as whole multiples 0..levels of one float16.

    One that rounding has left below 0 wraps to the highest level, as ggml's unsigned byte does.
    """
    most = parts.amax(1, keepdim=True)
    most = torch.where(most > 0, most, 0.0)  # and no −0, whose bytes differ
    inverse = torch.where(most > 0, _ratio(levels, most), 0.0)
    return (_nearest(inverse * parts) & 0xFF).clamp_max(levels), _float16(_ratio(most, levels))


def _fit_line(
    x_NB: Tensor, importance_NB: Tensor, top: int, first: float, tries: int, by_magnitude: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Search scale and offset of x ≈ scale·code − offset, scale [B], offset ≥ 0 [B], codes 0..top [N, B].

    Several grids give codes; for each, the weighted least squares line through (code, x) replaces the grid; the best of
    these lines by the weighted error is kept. The first candidate is the plain grid from the least weight (or 0) to the
    largest. A grid begins where the best line so far does, as ggml has it.
    """
    start_B, most_B = x_NB.amin(0).clamp_max(0), x_NB.amax(0)
    flat_B = most_B == start_B
    most_B = torch.where(flat_B, most_B + 1, most_B)  # any range will do, the result is replaced
    weight_B, weighted_B = _sum(importance_NB), _sum(importance_NB * x_NB)

    def error(scale_B: Tensor, start_B: Tensor, codes_NB: Tensor) -> Tensor:
        rest_NB = scale_B * codes_NB + start_B - x_NB
        return _sum(importance_NB * (rest_NB.abs() if by_magnitude else rest_NB * rest_NB))

    inverse_B = _ratio(top, most_B - start_B)
    scale_B, codes_NB = 1 / inverse_B, _nearest(inverse_B * (x_NB - start_B)).clamp(0, top)
    least_error_B = error(scale_B, start_B, codes_NB)
    for steps in _tried(first, tries, top):
        tried_NB = _nearest(_ratio(steps, most_B - start_B) * (x_NB - start_B)).clamp(0, top)
        line = _least_squares(x_NB, importance_NB, weight_B, weighted_B, tried_NB)
        error_B = error(line.scale_B, line.start_B, tried_NB)
        better_B = line.found_B & (error_B < least_error_B)
        least_error_B = torch.where(better_B, error_B, least_error_B)
        scale_B, start_B = torch.where(better_B, line.scale_B, scale_B), torch.where(better_B, line.start_B, start_B)
        codes_NB = torch.where(better_B, tried_NB, codes_NB)
    scale_B = scale_B.masked_fill(flat_B, 0.0)
    start_B = torch.where(flat_B, x_NB[0].clamp_max(0), start_B)
    return scale_B, -start_B, codes_NB.masked_fill(flat_B, 0)


def _tried(first: float, tries: int, top: int) -> list[float]:
    """Return first + 0.1·i + top for i = 0..tries, each operation rounded to float32."""
    return (first + torch.tensor(0.1) * torch.arange(tries + 1) + top).tolist()


class _Line(NamedTuple):
    scale_B: Tensor
    start_B: Tensor
    found_B: Tensor


def _least_squares(
    x_NB: Tensor, importance_NB: Tensor, weight_B: Tensor, weighted_B: Tensor, codes_NB: Tensor
) -> _Line:
    """Fit x ≈ scale·code + start with start ≤ 0; not found where all codes are equal."""
    counted_NB = importance_NB * codes_NB
    sum_B, squares_B, products_B = _sum(counted_NB), _sum(counted_NB * codes_NB), _sum(counted_NB * x_NB)
    determinant_B = weight_B * squares_B - sum_B * sum_B
    start_B = (squares_B * weighted_B - sum_B * products_B) / determinant_B
    scale_B = (weight_B * products_B - weighted_B * sum_B) / determinant_B
    above_B = start_B > 0
    scale_B, start_B = torch.where(above_B, products_B / squares_B, scale_B), start_B.masked_fill(above_B, 0.0)
    return _Line(scale_B, start_B, determinant_B > 0)


def _q3_k(x: Tensor) -> Blocks:
    """Q3_K: sub-blocks of 16 with codes −4..3, and a scale that is −32..31 times the super-block's."""
    scale_B, codes_NB = _fit_by_exchange(x.reshape(-1, 16).T.contiguous(), 4)
    scales = scale_B.reshape(-1, 16)
    top = _largest(scales, 1)[:, None]
    inverse = torch.where(top == 0, 0.0, _ratio(-32, top))
    multiples = torch.where(top == 0, -32, _nearest(inverse * scales).clamp(-32, 31))
    scale = _float16(torch.where(top == 0, 0.0, 1 / inverse))
    return _one_sided(x, codes_NB, multiples, scale, half=4)


def _q6_k(x: Tensor) -> Blocks:
    """Q6_K: sub-blocks of 16 with codes −32..31, and a scale that is −128..127 times the super-block's."""
    scale_B, codes_NB = _fit_by_grids(x.reshape(-1, 16).T.contiguous(), 32)
    scales = scale_B.reshape(-1, 16)
    top = _largest(scales, 1)[:, None]
    empty = top.abs() < LEAST_MAGNITUDE
    inverse = torch.where(empty, 0.0, _ratio(-128, top))
    multiples = _nearest(inverse * scales).clamp_max(127)
    scale = _float16(torch.where(empty, 0.0, 1 / inverse))
    found = _one_sided(x, codes_NB, multiples, scale, half=32)
    return found._replace(codes=found.codes.masked_fill(empty[..., None], -32))


def _one_sided(x: Tensor, codes_NB: Tensor, multiples: Tensor, scale: Tensor, *, half: int) -> Blocks:
    """Super-blocks without offsets, their codes rounded anew for the scales as they are stored."""
    codes = codes_NB.T.reshape(*multiples.shape, -1)
    blocks = Blocks(codes, multiples, scale, torch.ones_like(multiples), torch.zeros_like(scale))
    return blocks._replace(codes=_recoded(blocks, x.reshape(codes.shape), -half, half - 1))


def _recoded(blocks: Blocks, x: Tensor, low: int, high: int) -> Tensor:
    """Return the nearest codes on the stored grid; where the stored scale is 0, ggml leaves those of the search."""
    steps = blocks.steps
    dead = steps == 0
    return torch.where(dead, blocks.codes, _nearest(x / torch.where(dead, 1.0, steps)).clamp(low, high))


def _fit_by_exchange(x_NB: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Search the scale of x ≈ scale·code, [B], and codes −half..half − 1, [N, B].

    With errors that count w², the best scale for given codes leaves ⟨x, code⟩²/⟨code, code⟩ explained. Starting from
    the grid of the largest weight, each code in turn is moved to where the others' scale would put it if that explains
    more, in up to five rounds.
    """
    largest_B = _largest(x_NB, 0)
    empty_B = largest_B.abs() < LEAST_MAGNITUDE
    codes_NB = _nearest(_ratio(-half, largest_B.masked_fill(empty_B, 1.0)) * x_NB).clamp(-half, half - 1)
    importance_NB = x_NB * x_NB
    product_NB = importance_NB * x_NB
    products_B, squares_B = _sum(product_NB * codes_NB), _sum(importance_NB * codes_NB * codes_NB)
    for _ in range(5):
        before_NB = codes_NB.clone()
        for x_B, importance_B, product_B, code_B in zip(x_NB, importance_NB, product_NB, codes_NB, strict=True):
            others_B = products_B - product_B * code_B
            rest_B = squares_B - importance_B * code_B * code_B
            moved_B = _nearest(x_B * rest_B / others_B).clamp(-half, half - 1)
            now_products_B, now_squares_B = others_B + product_B * moved_B, rest_B + importance_B * moved_B * moved_B
            better_B = (others_B > 0) & (moved_B != code_B) & (now_squares_B > 0)
            better_B &= now_products_B * now_products_B * squares_B > products_B * products_B * now_squares_B
            products_B = torch.where(better_B, now_products_B, products_B)
            squares_B = torch.where(better_B, now_squares_B, squares_B)
            code_B.copy_(torch.where(better_B, moved_B, code_B))
        if torch.equal(codes_NB, before_NB):
            break
    scale_B = torch.where(squares_B > 0, products_B / squares_B, 0.0)
    return scale_B.masked_fill(empty_B, 0.0), codes_NB.masked_fill(empty_B, -half)


def _fit_by_grids(x_NB: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Search the scale of x ≈ scale·code, [B], and codes −half..half − 1, [N, B].

    With errors that count w², the best scale for given codes leaves ⟨x, code⟩²/⟨code, code⟩ explained. 19 grids give
    codes: the one on which the largest weight has the code −half, and those 0.1 to 0.9 finer or coarser.
    """
    largest_B = _largest(x_NB, 0)
    empty_B = largest_B.abs() < LEAST_MAGNITUDE
    largest_B = largest_B.masked_fill(empty_B, 1.0)
    importance_NB = x_NB * x_NB
    product_NB = importance_NB * x_NB

    def fitted(steps: float) -> tuple[Tensor, Tensor, Tensor]:
        codes_NB = _nearest(_ratio(-steps, largest_B) * x_NB).clamp(-half, half - 1)
        return _sum(product_NB * codes_NB), _sum(importance_NB * codes_NB * codes_NB), codes_NB

    products_B, squares_B, codes_NB = fitted(half)
    scale_B = torch.where(squares_B == 0, 0.0, products_B / squares_B)
    explained_B = scale_B * products_B
    for steps in (half + torch.tensor(0.1) * torch.arange(-9, 10)).tolist():
        if steps == half:
            continue
        products_B, squares_B, tried_NB = fitted(steps)
        better_B = (squares_B > 0) & (products_B * products_B > explained_B * squares_B)
        scale_B = torch.where(better_B, products_B / squares_B, scale_B)
        explained_B = torch.where(better_B, scale_B * products_B, explained_B)
        codes_NB = torch.where(better_B, tried_NB, codes_NB)
    return scale_B.masked_fill(empty_B, 0.0), codes_NB.masked_fill(empty_B, -half)


def _largest(x: Tensor, dim: int) -> Tensor:
    """Return the number of the largest magnitude along an axis with its sign; the first of several."""
    return x.gather(dim, x.abs().argmax(dim, keepdim=True)).squeeze(dim)


def _ratio(a: Tensor | float, b: Tensor | float) -> Tensor:
    """Divide with one rounding: where one side is a plain number, torch may multiply by a rounded reciprocal."""
    device = next(side.device for side in (a, b) if isinstance(side, Tensor))
    over, under = (torch.as_tensor(side, dtype=torch.float32, device=device) for side in (a, b))
    return over / under


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _float16(x: Tensor) -> Tensor:
    return x.half().float()


def _nearest(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even, int32; beyond ±2²² the low bits are what ggml takes, too."""
    return ((x + ROUNDER).view(torch.int32) & 0x7FFFFF) - 0x400000


def _sum(terms_NB: Tensor) -> Tensor:
    """Add from the first to the last, as a plain loop does."""
    return reduce(torch.add, terms_NB.unbind())


TYPES = {
    "Q4_0": BlockType(32, partial(_by_largest, half=8)),
    "Q4_1": BlockType(32, partial(_by_range, top=15)),
    "Q5_0": BlockType(32, partial(_by_largest, half=16)),
    "Q5_1": BlockType(32, partial(_by_range, top=31)),
    "Q8_0": BlockType(32, _by_magnitude),
    "Q2_K": BlockType(
        SUPER, partial(_with_offsets, members=16, top=3, levels=15, first=-0.5, tries=15, by_magnitude=True)
    ),
    "Q3_K": BlockType(SUPER, _q3_k),
    "Q4_K": BlockType(
        SUPER, partial(_with_offsets, members=32, top=15, levels=63, first=-1.0, tries=20, by_magnitude=False)
    ),
    "Q5_K": BlockType(
        SUPER, partial(_with_offsets, members=32, top=31, levels=63, first=-0.5, tries=15, by_magnitude=False)
    ),
    "Q6_K": BlockType(SUPER, _q6_k),
}


def fill(x: Tensor, name: str) -> Blocks:
    """Fill blocks of a type from rows of weights whose length its block divides.

    Args:
        x: float32 weights [O, I].
        name: a key of TYPES.

    Returns blocks in the order of the rows.
    """
    kind = TYPES[name]
    at_once = CACHED if x.device.type == "cpu" else ON_DEVICE
    parts = [kind.fill(part) for part in x.reshape(-1, kind.weights).split(at_once // kind.weights)]
    return Blocks(*map(torch.cat, zip(*parts, strict=True)))
