"""stillknows: unlearn knowledge from a language model, then find out whether the model still knows it."""

__version__ = "0.1.0"
