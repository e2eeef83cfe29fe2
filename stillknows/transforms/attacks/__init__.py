"""Attacks: what brings hidden knowledge back. Each is one function: of questions, of decoding or of weights."""

from stillknows.transforms.attacks import frames, relearning, sampling  # noqa: F401
