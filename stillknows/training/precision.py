"""What passes for gradients multiply in, and how much one of them takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stillknows.lazy import nn, torch

SMALL = 50_000_000  # weights up to which a bfloat16 copy of them costs more than it saves


PART_TOKENS = 640  # of a pass of a model of some size on a CPU, which gains nothing from more


def passes(model: nn.Module, lengths: Sequence[int], device: str | None = None) -> int:
    """Return in how many passes a batch of items of these lengths is read, so that it takes little memory beside the
    weights: one for small models, and where memory is the user's to divide.

    device: where the model will be; None for where it is.
    """
    if (device or next(model.parameters()).device.type) != "cpu" or not _is_large(model):
        return 1
    return math.ceil(len(lengths) * max(lengths) / PART_TOKENS)


def multiplies_bfloat16(model: nn.Module, compute: str) -> bool:
    """Tell whether training multiplies in bfloat16: as it is said, or for models of some size where that is faster."""
    if compute != "auto":
        return compute == "bfloat16"
    weight = next(model.parameters())
    if not _is_large(model):
        return False
    if weight.device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return weight.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def computing(model: nn.Module, bfloat16: bool) -> torch.autocast:
    """Return a block in which products are of bfloat16 numbers, if that is asked for; sums are of float32 ones."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bfloat16)


def _is_large(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) >= SMALL
