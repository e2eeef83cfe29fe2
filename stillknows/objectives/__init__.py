"""Forget and retain terms. Importing the folder registers them."""

from stillknows.objectives import forget, retain

__all__ = ["forget", "retain"]
