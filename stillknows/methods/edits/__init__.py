"""Edits: weights changed at once, not by descent on a loss. Importing the folder registers them."""

from stillknows.methods.edits import activation, arithmetic, distillation, formats, influence

__all__ = ["activation", "arithmetic", "distillation", "formats", "influence"]
