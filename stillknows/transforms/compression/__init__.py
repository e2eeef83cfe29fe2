"""Formats. Importing the folder registers them. Each maps a float32 matrix [O, I] to what the format stores.

Those of activations and of the cache map the rows that a model makes as it runs to what they are rounded to."""

from stillknows.transforms.compression import (
    activations,
    cache,
    calibrated,
    casts,
    codebooks,
    floating,
    gguf,
    hqq,
    int8,
    pruning,
    rtn,
)

__all__ = [
    "activations",
    "cache",
    "calibrated",
    "casts",
    "codebooks",
    "floating",
    "gguf",
    "hqq",
    "int8",
    "pruning",
    "rtn",
]
