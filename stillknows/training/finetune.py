"""Ordinary fine-tuning: one objective on one list of items, until all steps are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stillknows import __version__
from stillknows.lazy import nn
from stillknows.model import run_record
from stillknows.model.encoding import EncodedAnswer, encode
from stillknows.model.ref import ModelRef
from stillknows.registry import bind
from stillknows.store import RECORD, locked, require_new, require_outside
from stillknows.training.loop import FitResult, fit
from stillknows.training.objective_inputs import Term
from stillknows.training.settings import Settings
from stillknows.types import Example


def finetune(
    model: nn.Module,
    items: Sequence[EncodedAnswer],
    settings: Settings,
    *,
    objective: str = "nll",
    label: str = "fine-tuning",
    **how: Any,
) -> FitResult:
    """Fine-tune a model in place on the answers of the items, and return what was done.

    Nothing is to be forgotten or watched here, so the early stops of `settings` do not apply.

    Args:
        objective: a retain term, such as "nll": the mean over items of the answer tokens' mean −ln p.
        label: what the progress bar says.
        how: further arguments of `loop.fit`, such as `step_plugins`, `start` or `look`.

    Raises UserError as `loop.fit` does.
    """
    plain = replace(settings, forget_below=0.0, retain_floor=0.0)
    return fit(model, [Term(bind("objective", objective, "retain"), items)], plain, label=label, **how)


def write_finetuned(
    ref: ModelRef,
    examples: Sequence[Example],
    template: str,
    settings: Settings,
    out: Path,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fine-tune a model on the examples' answers, write it in float32 with run.json, and return that record.

    Raises UserError for bad input, for an `out` in the model's folder and for one that holds a run already.
    """
    require_outside(out, [ref.folder])
    items = encode(examples, ref.check().tokenizer, template, ref.context_length, vocabulary=ref.vocabulary_size)
    with locked(out):
        require_new(out / RECORD, overwrite=overwrite)
        model = ref.load().model
        outcome = finetune(model, items, settings, label=f"fine-tuning {ref.name}")
        record = {
            "stillknows": __version__,
            "model": ref.name,
            "fine-tuned on": f"{len(items)} examples",
            "settings": asdict(settings),
            "fit": outcome.to_json(),
            "versions": run_record.versions(),
        }
        run_record.save(model, ref.tokenizer, out, record)
    return record
