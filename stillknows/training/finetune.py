"""Ordinary fine-tuning: one objective on one list of items, until all steps are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stillknows import __version__
from stillknows.lazy import nn
from stillknows.model import run_record
from stillknows.model.encoding import EncodedAnswer, encode
from stillknows.model.ref import ModelRef
from stillknows.registry import bind
from stillknows.store import RECORD, digest, locked, require_new, require_outside
from stillknows.training.checkpoint import CHECKPOINT
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
    objective: str = "nll",
    reader: ModelRef | None = None,
    said: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune a model on the examples' answers, write it in float32 with run.json, and return that record.

    A run of the same plan that was interrupted in `out` goes on where it was, and ends with the same weights.

    Args:
        reader: the model whose tokenizer reads the items and is written beside the weights; the model itself when None.
        said: what else the record is to hold.

    Raises UserError for bad input, for an `out` in the model's folder and for one that holds a run already.
    """
    reader = reader or ref
    require_outside(out, [*ref.folders, *reader.folders])
    items = encode(examples, reader.check().tokenizer, template, ref.context_length, vocabulary=ref.vocabulary_size)
    plan = [ref.fingerprint, objective, asdict(settings) | {"save_seconds": 0}, [(i.ids, i.start) for i in items]]
    with locked(out):
        checkpoint = out / CHECKPOINT
        if overwrite:
            checkpoint.unlink(missing_ok=True)
        require_new(out / RECORD, overwrite=overwrite)
        model = ref.load().model
        resumed: dict[str, Any] = {"checkpoint": checkpoint, "plan_key": digest(plan)}
        outcome = finetune(model, items, settings, objective=objective, label=f"fine-tuning {ref.name}", **resumed)
        record = {
            "stillknows": __version__,
            "model": ref.name,
            "fine-tuned on": f"{len(items)} examples",
            "template": template,
            **(said or {}),
            "settings": asdict(settings),
            "fit": outcome.to_json(),
            "versions": run_record.versions(),
        }
        written = run_record.save(model, reader.tokenizer, out, record)
        checkpoint.unlink(missing_ok=True)
    return written
