"""Formats. Importing the folder registers them. Each maps a float32 matrix [O, I] to what the format stores."""

from stillknows.quantizers import casts, codebooks, int8, rtn

__all__ = ["casts", "codebooks", "int8", "rtn"]
