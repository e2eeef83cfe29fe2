"""Blocks of weights as bytes, laid out as ggml lays them out (ggml-common.h of llama.cpp)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillknows.lazy import Tensor

Bytes = NDArray[Any]  # of uint8
SHIFTS = {"Q4_0": 8, "Q5_0": 16, "Q3_K": 4, "Q6_K": 32}  # added to codes, which are kept without a sign


def pack(name: str, parts: Mapping[str, Tensor]) -> Bytes:
    """Return blocks as bytes, [blocks, bytes of a block].

    Args:
        name: block type, such as "Q4_K".
        parts: codes [blocks, sub-blocks, N], multiples and offset_multiples [blocks, sub-blocks], whole numbers; scale
            and offset [blocks, 1]. A weight is scale·multiple·code − offset·offset_multiple.
    """
    codes = (parts["codes"] + SHIFTS.get(name, 0)).cpu().numpy().astype(np.uint8).reshape(len(parts["codes"]), -1)
    scale = _halves(parts["scale"])
    if name == "Q8_0":
        return np.concatenate([scale, codes], 1)
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        return _simple(name, codes, scale, _halves(-parts["offset"]))
    multiples = parts["multiples"].cpu().numpy()
    scales, offsets = (part.astype(np.uint8) for part in (multiples, parts["offset_multiples"].cpu().numpy()))
    if name == "Q2_K":
        return np.concatenate([_nibbles(scales, offsets), _pairs(codes), scale, _halves(parts["offset"])], 1)
    if name == "Q3_K":
        return np.concatenate([_bits(codes, 2, 1, 8), _pairs(codes), _six_bits(multiples + 32), scale], 1)
    if name == "Q6_K":
        by_128 = codes.reshape(-1, 2, 4, 32)
        low = _nibbles(by_128[:, :, :2] & 15, by_128[:, :, 2:] & 15).reshape(len(codes), -1)
        return np.concatenate([low, _bits(codes, 4, 2, 4), scales, scale], 1)
    by_64 = codes.reshape(-1, 4, 2, 32)
    low = _nibbles(by_64[:, :, 0] & 15, by_64[:, :, 1] & 15).reshape(len(codes), -1)
    fifth = [_bits(codes, 4, 1, 8)] if name == "Q5_K" else []
    return np.concatenate([scale, _halves(parts["offset"]), _six_bit_pairs(scales, offsets), *fifth, low], 1)


def _simple(name: str, codes: Bytes, scale: Bytes, minimum: Bytes) -> Bytes:
    """Blocks of 32: the first half of the codes in the low halves of the bytes; a fifth bit of each beside them."""
    fifth = [np.packbits(codes >> 4, axis=1, bitorder="little")] if name in ("Q5_0", "Q5_1") else []
    minimum_too = [minimum] if name in ("Q4_1", "Q5_1") else []
    return np.concatenate([scale, *minimum_too, *fifth, _nibbles(codes[:, :16] & 15, codes[:, 16:] & 15)], 1)


def _halves(x: Tensor) -> Bytes:
    return x.cpu().numpy().astype(np.float16).view(np.uint8)


def _nibbles(low: Bytes, high: Bytes) -> Bytes:
    return low | high << 4


def _pairs(codes: Bytes) -> Bytes:
    """The two lowest bits of each code, four codes to a byte."""
    return _bits(codes, 0, 2, 4)


def _bits(codes: Bytes, at: int, bits: int, per_byte: int, group: int = 32) -> Bytes:
    """Bits of each code from `at` on; a byte holds those of the codes at one place in `per_byte` groups on end."""
    parts = (codes >> at & (1 << bits) - 1).reshape(len(codes), -1, per_byte, group)
    shifts = (bits * np.arange(per_byte, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(codes), -1)


def _six_bits(scales: NDArray[np.int32]) -> Bytes:
    """16 scales of 6 bits in 12 bytes: low halves in pairs, then the high bits, four to a byte."""
    raw = scales.astype(np.uint8)
    return np.concatenate([_nibbles(raw[:, :8] & 15, raw[:, 8:] & 15), _bits(raw, 4, 2, 4, group=4)], 1)


def _six_bit_pairs(scales: Bytes, offsets: Bytes) -> Bytes:
    """8 scales and 8 offsets of 6 bits in 12 bytes: the last four's high bits sit on top of the first four."""
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, offsets)]
    return np.concatenate([*first, _nibbles(scales[:, 4:] & 15, offsets[:, 4:] & 15)], 1)
