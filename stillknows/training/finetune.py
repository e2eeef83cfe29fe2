"""Ordinary fine-tuning: one objective on one list of items, until all steps are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stillknows.lazy import nn
from stillknows.model.text import Encoded
from stillknows.registry import bind
from stillknows.training.loop import Fit, Settings, fit
from stillknows.training.objective_inputs import Term


def finetune(
    model: nn.Module,
    items: Sequence[Encoded],
    settings: Settings,
    *,
    objective: str = "nll",
    label: str = "fine-tuning",
    **how: Any,
) -> Fit:
    """Fine-tune a model in place on the answers of the items, and return what was done.

    Nothing is to be forgotten or watched here, so the early stops of `settings` do not apply.

    Args:
        objective: a retain term, such as "nll": the mean over items of the answer tokens' mean −ln p.
        label: what the progress bar says.
        how: further arguments of `loop.fit`, such as `wrappers`, `start` or `look`.

    Raises UserError as `loop.fit` does.
    """
    plain = replace(settings, forget_below=0.0, retain_floor=0.0)
    return fit(model, [Term(bind("retain", objective), items)], plain, label=label, **how)
