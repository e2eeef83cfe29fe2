"""Edits that add, subtract and mix weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from stillknows.formatting import percent
from stillknows.lazy import Tensor, nn, no_grad
from stillknows.model import parameters
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import mean_extraction, mean_probability, score_items
from stillknows.model.layers import output_layer
from stillknows.progress import log
from stillknows.registry import Limits, register
from stillknows.training import interpolate


@register("edit", source="arXiv 2212.04089; as in MUSE, arXiv 2407.06460")
@no_grad
def task_vector(model: nn.Module, original: Mapping[str, Tensor], reinforced: nn.Module, *, alpha: float = 5.0) -> None:
    """Negated task vector: θ ← θ − α·(θ_ft − θo), where θ_ft is θo trained further on the forget set.

    Args:
        alpha: scale α of what is taken away. MUSE's code leaves it to the user, with 1 if none is given.
    """
    taught = parameters.named(reinforced)
    steps = ((name, taught[name].to(p) - original[name].to(p)) for name, p in model.named_parameters())
    parameters.add(model, steps, -alpha)


@register("edit", source="arXiv 2406.09179 (UWC, model mixing)")
def mix(model: nn.Module, original: Mapping[str, Tensor], *, alpha: Annotated[float, Limits(0, 1)] = 0.5) -> None:
    """Draw the model back towards the original: θ ← (1 − α)·θo + α·θ.

    Args:
        alpha: share α of what was unlearned, 0..1; 1 leaves the model as it is.
    """
    interpolate.mix(model, original, parameters.copies(model), alpha)


@register("edit", source="arXiv 2406.09179 (UWC, calibration by model mixing)")
def equal_retain(
    model: nn.Module,
    original: Mapping[str, Tensor],
    retain: Sequence[EncodedAnswer],
    *,
    floor: Annotated[float, Limits(0, 1, above=True)] = 0.95,
    by: Literal["answer_probability", "extraction_strength"] = "answer_probability",
) -> None:
    """Draw the model back as far as it takes to keep what is to be retained: (1 − α)·θo + α·θ with the largest such α.

    Methods that went through it forget as much as they can at the same price. The score is a mean over the retain items
    that training sees.

    Args:
        floor: share of the original's score that is kept, above 0 and up to 1.
        by: "answer_probability", exp(mean ln p) of each answer; "extraction_strength", the share of an answer that
            follows from what stands before it, as published.
    """

    def score() -> float:
        layer = output_layer(model)
        if by == "extraction_strength":
            return mean_extraction(score_items(model, layer, retain), retain)
        return mean_probability(score_items(model, layer, retain, with_distribution=()))

    alpha = interpolate.calibrate(model, original, score, floor)
    if alpha < 1:
        kept = f"{percent(floor)} of the original's {by.replace('_', ' ')} on retain"
        log(f"mixed with the original: {percent(alpha)} of the update is taken, which keeps {kept}")
