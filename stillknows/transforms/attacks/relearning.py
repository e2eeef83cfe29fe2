"""Training on a part: what was hidden comes back with it, what was removed does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from stillknows.errors import UserError, first_line
from stillknows.lazy import nn
from stillknows.model.encoding import EncodedAnswer
from stillknows.registry import Limits, bind, register
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
    data: Literal["forget", "retain", "unrelated", "random"] = "forget",
    rank: Annotated[int, Limits(0)] = 0,
    items: Annotated[int, Limits(0)] = 0,
) -> None:
    """Fine-tune the model on every second fact of the forget split and ask for the others; the taught are not judged.

    The controls are taught the same, in the same order: what they gain is learned or guessed, not remembered.

    Args:
        steps: of AdamW, on all weights in float32; 0 leaves the model as it is.
        lr: its learning rate.
        batch_size: items in a step.
        seed: of their order, and of the adapter's start.
        data: what is taught. "forget": every second fact. "retain": items to retain; "unrelated": such questions with
            each other's answers, facts that nobody knew; "random": texts of random tokens. These three teach none of
            the facts, so that all are asked, and items that hold an answer to be forgotten are left out of them.
        rank: of a low-rank adapter (LoRA, α = 2·rank) that is trained in the place of all weights; 0 for none.
        items: how many of these items are taught, the first ones; 0 for all.
    """
    _teach(model, taught, "relearn", Settings(lr, float(steps), steps, batch_size, seed=seed), rank)


@register("transform", role="attack", budget="steps", source="arXiv 2410.08827 (RTT)")
def rtt(
    model: nn.Module,
    taught: Sequence[EncodedAnswer],
    *,
    fold: Annotated[int, Limits(0)] = 0,
    folds: Annotated[int, Limits(2)] = 5,
    steps: Annotated[int, Limits(0, MOST_STEPS)] = 20,
    lr: Annotated[float, Limits(0, above=True)] = 1e-4,
    batch_size: Annotated[int, Limits(1)] = 4,
    seed: int = 0,
) -> None:
    """Retrain on four fifths of the facts that are to be forgotten and ask for the fifth, which is fold `fold`.

    The folds share no fact. rtt(fold=0), rtt(fold=1), … rtt(fold=4) ask for each fact once, where it was not taught.

    Args:
        fold: which fold is asked, from 0 to folds − 1.
        folds: how many there are.
        steps: of AdamW, on all weights in float32; 0 leaves the model as it is.
        lr: its learning rate.
        batch_size: items in a step.
        seed: of their order.
    """
    _teach(model, taught, "rtt", Settings(lr, float(steps), steps, batch_size, seed=seed))


def _teach(model: nn.Module, items: Sequence[EncodedAnswer], who: str, settings: Settings, rank: int = 0) -> None:
    adapter = [bind("step", f"lora:rank={rank}:alpha={2 * rank}:seed={settings.seed}")] if rank else []
    try:
        finetune(model, items, settings, label="relearning", step_plugins=adapter)
    except UserError as error:
        raise UserError(f"{who}:lr={settings.lr:g}: {first_line(error)}", f"lower it: {who}(lr=…)") from error
