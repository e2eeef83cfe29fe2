"""Metrics. Importing the folder registers them. Each gives one score per example, [N] float64.

A metric's parameters are named after the fields of Observations that it reads (types.py), with `reference_` before
them for those of the control. What a score means is registered with it: "knowledge" is 0..1 and higher where more of
the true answer is known; "membership" is any number, higher for likelier members of the training data; "behaviour" is
what the docstring says. An example that a metric cannot judge is NaN, never 0. No metric sees a model, torch or
transformers.
"""

from stillknows.metrics.example import behaviour, generation, likelihood, membership

__all__ = ["behaviour", "generation", "likelihood", "membership"]
