"""Forget and retain terms. Importing the folder registers them."""

from stillknows.methods.objectives import distribution, likelihood, preference, representation

__all__ = ["distribution", "likelihood", "preference", "representation"]
