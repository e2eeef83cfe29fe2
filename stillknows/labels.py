"""What models are called in tables and reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from stillknows.types import CONTROL, ORIGINAL

REFERENCE_MODEL = "reference-model"  # with a number behind it: one that membership is told by, and that is not judged


def control_labels(count: int) -> tuple[str, ...]:
    """Return the names of so many never-taught controls: control, control-2, control-3, …"""
    return (CONTROL, *(f"{CONTROL}-{i}" for i in range(2, count + 1)))[:count]


def is_control(label: str) -> bool:
    """Tell whether a model is called like a never-taught control."""
    return re.fullmatch(rf"{CONTROL}(-[1-9]\d*)?", label) is not None


def is_reference(label: str) -> bool:
    """Tell whether a model is called like one that others are compared with: the original, or a control."""
    return label == ORIGINAL or is_control(label)


def labels(names: Sequence[str]) -> dict[str, str]:
    """Name models after their folders, with a number where two are alike or one is called like a control."""
    found: dict[str, str] = {}
    for name in names:
        base = Path(name).resolve().name if Path(name).exists() else name.rsplit("/", 1)[-1]
        base = base.removesuffix(".json")
        label = base = f"audited-{base}" if is_reference(base) or base.startswith(f"{REFERENCE_MODEL}-") else base
        count = 2
        while label in found:
            label, count = f"{base}-{count}", count + 1
        found[label] = name
    return found
