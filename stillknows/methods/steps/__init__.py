"""Wrappers: which gradient is applied to which weights. Importing the folder registers them."""

from stillknows.methods.steps import adapters, adversaries, combinations, curricula, layers, masks, optimizers

__all__ = ["adapters", "adversaries", "combinations", "curricula", "layers", "masks", "optimizers"]
