"""Recipes: names for methods of several parts. Importing the folder registers them."""

from stillknows.methods.recipes import published, representation, robust

__all__ = ["published", "representation", "robust"]
