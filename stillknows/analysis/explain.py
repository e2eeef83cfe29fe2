"""What the numbers of a diagnosis say in words: what becomes of an update in a format, why, and what would carry it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillknows.analysis.recovery_curve import LOST, SURVIVES
from stillknows.formatting import percent, significant

HALF = 0.5  # with LOST and SURVIVES, the bounds between the words for a surviving share


def cause(shares: Mapping[str, Any]) -> str:
    """Say in words what `Tally.shares` says of a format: what becomes of the update, and what goes with it."""
    surviving, steps, crossing = shares["surviving"], shares["update_steps"], percent(shares["crossing"])
    if surviving is None:
        return "no weight that this format quantizes was changed"
    if surviving >= SURVIVES:
        carried = f", but the {crossing} of the weights that change bins carry it over"
        return f"the update survives: {_size(steps)}{carried if steps is not None and steps < 1 else ''}"
    fate = "part" if surviving >= HALF else "most" if surviving >= LOST else "nearly all"
    words = f"{fate} of the update is lost: {_size(steps)}; {crossing} of the weights change bins"
    if shares["zero_bin_changed"] > shares["zero_bin"]:
        changed, everywhere = percent(shares["zero_bin_changed"]), percent(shares["zero_bin"])
        words += f"; {changed} of the changed weights lie in the zero bin, as do {everywhere} of all weights"
    return words


def _size(steps: float | None) -> str:
    if steps is None:
        return "the format holds the original's weights exactly"
    if steps < 1:
        return f"it is smaller than the format's steps ({significant(steps)} of a step)"
    return f"it is as large as the format's steps ({significant(steps)} steps)"


def storage(run: Mapping[str, Any]) -> str:
    """Say how the weights were kept while they were unlearned, and what that let a step move."""
    words = f"Run record: weights kept as {run['weights']} between steps, learning rate {run['lr']}."
    if "movable" not in run:
        return words
    return (
        f"{words} A step of that size moves {percent(run['movable'])} of the weights in bfloat16; above "
        f"{significant(run['half_movable_lr'])} it moves half of them. A float32 master copy, or stochastic "
        "rounding, loses no step: changed weights then lie anywhere in their bins, and formats carry the change on "
        "average."
    )


def remedy(found: Mapping[str, Any]) -> str:
    """Say which learning rate would have made a lost update half a step of the format long; nothing where none is."""
    if found.get("least_lr") is None:
        return ""
    return (
        f"At a learning rate of {significant(found['least_lr'])} a typical change would be half a step of the format, "
        "if updates grow with it, as Adam's do over as many steps: an estimate, which an audit of such a model checks"
    )
