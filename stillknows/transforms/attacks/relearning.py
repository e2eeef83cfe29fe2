"""Teaching some of the forgotten facts: what was hidden comes back with them, what was removed does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from stillknows.errors import UserError, first_line
from stillknows.lazy import nn
from stillknows.model.encoding import EncodedAnswer
from stillknows.registry import Limits, register
from stillknows.training.finetune import finetune
from stillknows.training.settings import MOST_STEPS, Settings


@register("transform", role="attack", budget="steps", source="arXiv 2410.08827 (retraining on T), 2406.13356")
def relearn(
    model: nn.Module,
    taught: Sequence[EncodedAnswer],
    *,
    steps: Annotated[int, Limits(0, MOST_STEPS)] = 20,
    lr: Annotated[float, Limits(0, above=True)] = 1e-4,
    batch_size: Annotated[int, Limits(1)] = 16,
    seed: int = 0,
) -> None:
    """Fine-tune the model on every second fact of the forget split and ask for the others; the taught are not judged.

    The controls are taught the same, in the same order: what they gain is learned or guessed, not remembered.

    Args:
        steps: of AdamW, on all weights in float32; 0 leaves the model as it is.
        lr: its learning rate.
        batch_size: items in a step.
        seed: of their order.
    """
    settings = Settings(lr=lr, epochs=float(steps), max_steps=steps, batch_size=batch_size, seed=seed)
    try:
        finetune(model, taught, settings, label="relearning")
    except UserError as error:
        raise UserError(f"relearn:lr={lr:g}: {first_line(error)}", "lower it: relearn(lr=…)") from error
