"""What is done to the answers: models that answer together, and a filter on what is said."""

from __future__ import annotations

from collections.abc import Sequence

from stillknows.lazy import nn
from stillknows.registry import register


@register("transform", role="defence", source="arXiv 2404.11045")
def offset(model: nn.Module, unlearned: nn.Module, reference: nn.Module, *, weight: float = 1.0) -> nn.Module:
    """Logit offset: z + w·(z_unlearned − z_reference), from two small models of the same vocabulary.

    Formats are applied to the served model's weights; the two small models stay in full precision.

    Args:
        weight: w, how far the answers are pushed.
    """
    from stillknows.variants.together import Together

    return Together([model, unlearned, reference], [1.0, weight, -weight])


@register(
    "transform",
    role="defence",
    source="this project: a list of texts that are not said, as served models filter output",
)
def output_filter(model: nn.Module, withheld: Sequence[Sequence[int]]) -> nn.Module:
    """A filter on the output: no answer that is to be forgotten is completed, whatever was asked.

    The last token of such an answer gets probability 0 after its others; an answer of one token is never said. Kept
    facts with the same answer suffer. What is asked is not looked at.
    """
    from stillknows.variants.withheld import Withheld

    return Withheld(model, withheld)
