"""How long an audit will take, told as soon as its first cell has been measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from stillknows.auditing.observe import EXTRA_TOKENS
from stillknows.auditing.prepared import Prepared
from stillknows.formatting import number
from stillknows.progress import log
from stillknows.variants.variant import Variant

Todo = Mapping[str, Sequence[str]]  # by variant, the splits that are to be observed


def cost(model: Prepared, variant: Variant, split: str) -> int:
    """Return how many tokens one cell takes: those of each prompt, of each answer that is scored, of each continuation.

    What a transform does to the weights is not counted: rounding and training take as long as they take.
    """
    fields, decoding = model.observed(variant, split)
    total = 0
    for item in model.reading(variant).items[split]:
        scored = [item.answer, *item.placebos, *item.wrong, *filter(None, (item.paraphrase, item.lowered))]
        answer = len(item.answer.ids) - item.answer.start
        said = decoding.new_tokens or answer + EXTRA_TOKENS
        continued = ("generations" in fields) + decoding.samples * ("samples" in fields)
        total += item.answer.start + sum(len(one.ids) - one.start for one in scored) + said * continued
    return total


class Forecast:
    """Tells once how long the cells of an audit will take, at the speed of the first one."""

    def __init__(self, cells: Iterable[int]) -> None:
        """cells: what each of them costs, in tokens."""
        costs = list(cells)
        self.total, self.count, self.told = sum(costs), len(costs), False

    @classmethod
    def of(cls, models: Sequence[Prepared], variants: Mapping[str, Variant], todo: Mapping[str, Todo]) -> Forecast:
        """Return the forecast for what is to be done, by model."""
        return cls(
            cost(model, variants[name], split)
            for model in models
            for name, splits in todo[model.label].items()
            for split in splits
        )

    def measured(self, tokens: int, seconds: float) -> None:
        """Take note of a cell: what it cost, and how long it took."""
        if not self.told and self.count > 1:
            minutes = seconds / max(tokens, 1) * self.total / 60
            about = f"about {number(minutes, digits=1)} minutes"
            log(f"{self.count} cells will take {about}, and what attacks train besides")
        self.told = True
