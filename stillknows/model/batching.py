"""Rows of tokens as batches: which go together, how they are padded, what they share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from stillknows.lazy import Tensor, torch


def common_prefix(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest run of tokens that every row begins with."""
    ordered = sorted(map(tuple, rows))
    pairs = zip(ordered[0], ordered[-1], strict=False)
    return tuple(token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def batches(lengths: Sequence[int], size: int, tokens: int) -> list[list[int]]:
    """Return indices in batches of at most `size` rows and, with padding, `tokens` tokens (a single row may have more),
    longest first, neighbours alike."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not found or len(found[-1]) == min(size, max(1, tokens // max(1, lengths[found[-1][0]]))):
            found.append([])
        found[-1].append(i)
    return found


def right_padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """Return ids [B, L], filled up with token 0. The padding comes after each row's last token, so a causal model
    cannot see it; which positions count is known from the lengths alone."""
    ids_BL = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for b, row in enumerate(rows):
        ids_BL[b, : len(row)] = torch.tensor(row)
    return ids_BL.to(device)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return ids [B, L], filled up on the left with token 0, and their mask."""
    length = max(len(row) for row in rows)
    ids_BL = torch.zeros(len(rows), length, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for b, row in enumerate(rows):
        if row:
            ids_BL[b, -len(row) :] = torch.tensor(row)
            mask_BL[b, -len(row) :] = 1
    return ids_BL.to(device), mask_BL.to(device)
