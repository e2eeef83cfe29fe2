"""Attacks: what brings hidden knowledge back. Each is one function: of questions, of decoding or of weights."""

from stillknows.transforms.attacks import (  # noqa: F401
    checkpoints,
    contexts,
    directions,
    entities,
    forms,
    frames,
    optimised,
    relearning,
    rewordings,
    rewriting,
    sampling,
    students,
    weights,
)
