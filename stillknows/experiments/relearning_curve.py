"""Relearning: how many steps of fine-tuning on some forgotten facts bring back others.

The model is taught one half of the forgotten items and asked the other half (retraining on T, arXiv 2410.08827). What
was removed has to be taught; what was hidden comes back by itself. The never-taught control goes through the same: what
it gains is learned or guessed, not remembered.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillknows.lazy import nn
from stillknows.model import parameters
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import mean_probability, score_items
from stillknows.model.layers import output_layer
from stillknows.training.finetune import finetune
from stillknows.training.settings import Settings
from stillknows.training.watch import Seen, Watch


def halves(items: Sequence[EncodedAnswer]) -> tuple[list[EncodedAnswer], list[EncodedAnswer]]:
    """Deal items out in two halves that share no fact: those to teach, and those to ask."""
    facts = list(dict.fromkeys(item.example.fact for item in items))
    taught = set(facts[::2])
    return (
        [item for item in items if item.example.fact in taught],
        [item for item in items if item.example.fact not in taught],
    )


def curve(model: nn.Module, items: Sequence[EncodedAnswer], settings: Settings) -> list[float]:
    """Teach half of the items and return the mean answer probability of the other half, 0..1, at every check.

    The first entry is that of the model as it is; one follows for every `settings.check_every` steps. The model is left
    as it was.
    """
    taught, asked = halves(items)
    layer = output_layer(model)

    class Asked(Watch):
        def look(self) -> Seen:
            return {"asked": mean_probability(score_items(model, layer, asked))}

    start = Asked().look()
    with parameters.restored(model):
        outcome = finetune(model, taught, settings, watch=Asked(), label="relearning")
    return [seen["asked"] for seen in (start, *outcome.history)]
