"""Whether a model still reads language: what it says of questions themselves, none of which is trained.

Retained answers can be learned by heart while everything else breaks: on SmolLM2, forty known facts rose to 1.58 of
their score while the perplexity of plain text went from 27 to 65,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stillknows.lazy import nn
from stillknows.model.batching import common_prefix
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import mean_probability, score_items
from stillknows.model.layers import output_layer

READS = 0.02  # least mean probability of a question's tokens in a model that reads language


def questions(model: nn.Module, items: Sequence[EncodedAnswer]) -> list[EncodedAnswer]:
    """Return the items' questions as what is to be said, without what all of them begin with; none for a model that
    was trained on answers alone, which says nothing of questions."""
    heads = [item.ids[: item.start] for item in items]
    shared = max(1, len(common_prefix(heads)))
    found = [
        replace(item, ids=head, start=shared, ends=False)
        for item, head in zip(items, heads, strict=True)
        if len(head) > shared
    ]
    if not found:
        return []
    score = mean_probability(score_items(model, output_layer(model), found, with_distribution=()))
    return found if score >= READS else []
