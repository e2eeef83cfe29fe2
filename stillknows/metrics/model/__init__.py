"""Figures: the numbers that benchmarks publish, made of several splits or of several models at once.

A figure is given the observations of one model under one variant by split name, `subject`, and those of the control
(for a published benchmark: the model retrained without the forget split), `control`, None where there is none. It
returns numbers by name and raises NotMeasured, with the reason in words, when a split, a field or the control is
missing. No figure sees a model, torch or transformers.
"""

from stillknows.metrics.model import leaks, membership, muse, tofu

__all__ = ["leaks", "membership", "muse", "tofu"]
