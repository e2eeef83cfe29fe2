"""Metrics. Importing the folder registers them. Each gives one score per example, [N] float64.

A metric's parameters are named after the fields of Observations that it reads (types.py). Scores are 0..1 and higher
means that more of the true answer is known. An example that a metric cannot judge is NaN, never 0. No metric sees a
model, torch or transformers.
"""

from stillknows.metrics import generation, likelihood

__all__ = ["generation", "likelihood"]
