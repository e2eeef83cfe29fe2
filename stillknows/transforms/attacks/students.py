"""A fresh student taught by the model itself: what the model says of anything carries what it knows along, or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from stillknows.errors import UserError, first_line
from stillknows.lazy import nn
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.parameters import update
from stillknows.registry import Limits, register
from stillknows.training.finetune import finetune
from stillknows.training.settings import MOST_STEPS, Settings
from stillknows.transforms.attacks.weights import gaussian


@register("transform", role="attack", budget="steps", source="arXiv 2506.06278 (distillation into a new model)")
def distill(
    model: nn.Module,
    retain: Sequence[EncodedAnswer],
    random: Sequence[EncodedAnswer],
    *,
    steps: Annotated[int, Limits(0, MOST_STEPS)] = 100,
    lr: Annotated[float, Limits(0, above=True)] = 1e-3,
    batch_size: Annotated[int, Limits(1)] = 16,
    seed: int = 0,
) -> None:
    """Train a model with random weights to say of other texts what this one says, and ask it.

    Minimises the mean of KL(p_model ‖ p_student) over the tokens of items to retain, without those that hold an answer
    to be forgotten, and of random texts. Matrices are drawn anew, from N(0, 1) at the root mean square of the model's
    own; norms and biases stay. Answers to random texts can carry knowledge along that no answer to a question shows;
    that the student knows nothing shows little.

    Args:
        steps: of AdamW; 0 leaves the model as it is.
        lr: its learning rate.
        batch_size: items in a step.
        seed: of the student's weights and of the items' order.
    """
    drawn = gaussian(seed)

    def start(student: nn.Module) -> None:
        update(student, lambda _, weight: weight if weight.dim() < 2 else drawn(weight))

    settings = Settings(lr, float(steps), steps, batch_size, seed=seed)
    try:
        finetune(model, [*retain, *random], settings, objective="kl", start=start, label="distilling")
    except UserError as error:
        raise UserError(f"distill:lr={lr:g}: {first_line(error)}", "lower it: distill(lr=…)") from error
