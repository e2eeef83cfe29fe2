"""4-bit formats with a fixed table of 16 values per block of 64 weights, scaled by the block's largest.

Double quantization keeps those scales in 8 bits too.
"""

from __future__ import annotations

import functools

from stillknows.lazy import Tensor, functional, torch
from stillknows.registry import register
from stillknows.transforms.compression.parts import largest, parts
from stillknows.variants.compress import Quantized, Stored

BLOCK = 64
REST = 21  # of a float32's bits; the others tell it from the next edge between two values of a table
SCALES = 256  # scales that double quantization stores together
TINY = 2.0**-126  # the least normal number in float32
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


@register("transform", role="deployment", source="arXiv 2305.14314 (QLoRA); bitsandbytes nf4, block 64", version=2)
def nf4(weight_OI: Tensor, *, double: bool = False) -> Quantized:
    """4-bit NormalFloat: each block of 64 is its largest magnitude times the nearest of 16 normal quantiles.

    Args:
        weight_OI: weights [O, I].
        double: keep the scales in 8 bits too, as bnb_4bit_use_double_quant=True does. The codes stay the same; a scale
            far below the mean of all may be stored as 0 or below it.
    """
    return _nearest(weight_OI, "nf4", double)


@register(
    "transform", role="deployment", source="bitsandbytes fp4, block 64: what load_in_4bit=True alone gives", version=2
)
def fp4(weight_OI: Tensor, *, double: bool = False) -> Quantized:
    """4-bit float (1 sign, 2 exponent, 1 mantissa bit): a block of 64 is its largest magnitude times 1 of 15 values.

    Args:
        weight_OI: weights [O, I].
        double: keep the scales in 8 bits too; see nf4.
    """
    return _nearest(weight_OI, "fp4", double)


TABLES = {"nf4": NF4, "fp4": FP4}


def _nearest(weight_OI: Tensor, name: str, double: bool) -> Quantized:
    device = weight_OI.device
    blocks = _blocks(weight_OI, BLOCK)
    scales = largest(blocks).clamp_min_(TINY)
    kept, stored = _in_8_bits(scales[:, 0]) if double else (scales[:, 0], {"scales": scales[:, 0]})
    codes, values = torch.empty_like(blocks, dtype=torch.int8), torch.empty_like(blocks)
    everything = parts(blocks, scales.reciprocal(), kept[:, None], codes, values)
    for weights, inverse, scale, codes_here, values_here in everything:
        scaled, places = torch.mul(weights, inverse, out=values_here).view(-1), codes_here.view(-1)
        _write_places(scaled, _cells(name, device), out=places)
        _write_values(places, _pairs(name, device), out=scaled)
        values_here.mul_(scale)
    return Quantized(_unblocked(values, weight_OI.shape), _unblocked(codes, weight_OI.shape), Stored(name, stored))


@functools.cache
def _cells(name: str, device: torch.device) -> Tensor:
    """Return what added to a number's order (see `_order`) gives its place above the REST lowest bits, by the cell that
    the number lies in, [cells] int32.

    A cell is the numbers whose orders agree above these bits; no two edges between neighbours of a table share one.
    Added is the number of edges below the cell, instead of the cell, and in the lowest bits just as much as makes a
    number carry over if it lies above the cell's own edge.
    """
    edges = _edges(torch.tensor(TABLES[name]))
    cells = torch.arange(2 ** (31 - REST), dtype=torch.int32)
    ends = torch.stack([cells << REST, (cells << REST) + (2**REST - 1)])
    numbers = torch.where(ends < 2**30, ends, ~ends).view(torch.float32).nan_to_num(0.0)  # 2^30: the order of 2.0
    added = torch.searchsorted(edges, numbers.amin(0), out_int32=True).sub_(cells) << REST
    at = _order(edges)
    added[at >> REST] += 2**REST - 1 - (at & (2**REST - 1))
    return added.to(device)


def _order(scaled: Tensor) -> Tensor:
    """Return whole numbers ≥ 0 that rise with numbers in −1..1, those below 0 after all others: positive numbers rise
    with their bits as float32, negative ones with their bits turned over."""
    bits = scaled.view(torch.int32)
    return (bits >> 31).bitwise_xor_(bits)


def _write_places(scaled: Tensor, cells: Tensor, out: Tensor) -> None:
    """Write the place in the table that is nearest, of two equally near ones the lower; `scaled` is overwritten.

    On a processor memory takes most of the time, so that nothing is kept twice.
    """
    order, cell = _order(scaled), scaled.view(torch.int32)
    torch.bitwise_right_shift(order, REST, out=cell)
    out.copy_(order.add_(cells.index_select(0, cell)).bitwise_right_shift_(REST))


@functools.cache
def _pairs(name: str, device: torch.device) -> Tensor:
    """Return two values side by side, [4096] of 64 bits, by the 16 bits that their two places have side by side."""
    book = torch.tensor(TABLES[name], device=device)
    places = torch.arange(2**12, dtype=torch.int16, device=device).view(torch.int8)
    return book[places.clamp(0, len(book) - 1).long()].view(torch.int64)  # those beyond are never asked for


def _write_values(places: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Write the values at these places, two with each look-up."""
    torch.index_select(pairs, 0, places.view(torch.int16).int(), out=out.view(torch.int64))


def _in_8_bits(scales: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return scales as double quantization gives them back, and what it stores of them: their mean plus, in blocks of
    256, the block's largest distance from it times the nearest of 256 values."""
    mean = scales.mean()
    blocks = _blocks(scales - mean, SCALES)
    largest = blocks.abs().amax(1, keepdim=True)
    book = _dynamic_book().to(scales.device)
    places = torch.bucketize(blocks * (1 / largest.clamp_min(TINY)), _edges(book))
    stored = {"scales": places.reshape(-1)[: len(scales)].to(torch.uint8), "largest": largest[:, 0], "mean": mean}
    return (book[places] * largest).reshape(-1)[: len(scales)] + mean, stored


def _dynamic_book() -> Tensor:
    """Return the 256 values of the signed 8-bit dynamic type, rising (arXiv 1511.04561): 0, 1, and for e = 0..6 the
    middles of 2^(6−e) equal parts of 0.1..1, times 10^−e, with either sign."""
    edges = [torch.linspace(0.1, 1, 2**k + 1) for k in range(7)]
    positive = torch.cat([10.0 ** (k - 6) * ((edge[:-1] + edge[1:]) / 2) for k, edge in enumerate(edges)])
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values


def _blocks(values: Tensor, size: int) -> Tensor:
    """Return values in blocks [blocks, size], in the order of the rows, the last one filled up with zeros."""
    flat = values.reshape(-1)
    missing = -len(flat) % size
    return (functional.pad(flat, (0, missing)) if missing else flat).reshape(-1, size)


def _unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Return blocks in the shape of the matrix that they were cut from, without what filled up the last one."""
    return (blocks if blocks.numel() == shape.numel() else blocks.view(-1)[: shape.numel()]).view(shape)


def _edges(book: Tensor) -> Tensor:
    return (book[1:] + book[:-1]) / 2
