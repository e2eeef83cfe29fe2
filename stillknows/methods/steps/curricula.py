"""Curricula: which items are forgotten, and which are still retained, at which stage of a run."""

from __future__ import annotations

from stillknows.errors import UserError
from stillknows.registry import register


@register("step", role="curriculum", source="arXiv 2505.09500")
def layered(count: int, *, folds: int = 4) -> list[tuple[list[int], list[int]]]:
    """Layered unlearning: stage i forgets folds ≤ i and retains folds > i; stages take equal shares of the steps.

    Args:
        count: number of items to forget.
        folds: into how many parts they are dealt out, one by one.

    Returns for each stage the items to forget and those that are retained for now, by index.
    """
    if not 1 <= folds <= count:
        raise UserError(f"layered: folds={folds} is out of range", f"give 1 to {count}, the number of items to forget")
    return [
        ([i for i in range(count) if i % folds <= stage], [i for i in range(count) if i % folds > stage])
        for stage in range(folds)
    ]
