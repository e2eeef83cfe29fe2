"""Models that answer together."""

from __future__ import annotations

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
