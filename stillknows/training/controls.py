"""Never-taught controls: the checkpoint from before fine-tuning, taught what is to be kept and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from stillknows.errors import UserError
from stillknows.model import run_record
from stillknows.model.ref import LoadOptions, ModelRef, require_same_shapes
from stillknows.store import digest, locked
from stillknows.training.finetune import write_finetuned
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Example, Role

LENGTHS = ("epochs", "max_steps")  # of training: one of them has to be known


@dataclass(frozen=True)
class ControlConfig:
    """What controls to make.

    original: the model that was taught everything; its run record, if it has one, says how.
    base: the checkpoint that the original was fine-tuned from; None: the one that its run record names.
    roles: whose items to train on.
    seeds: how many controls, which differ in the order of their items.
    template: frame of a question; None: the one in the original's run record, else the benchmark's.
    settings: in the place of those in the original's run record.
    """

    original: str
    benchmark: Benchmark
    base: str | None = None
    roles: tuple[Role, ...] = ("retain",)
    seeds: int = 1
    template: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"


@dataclass(frozen=True)
class Recipe:
    """How an original was made of its base: what a control repeats."""

    base: ModelRef
    objective: str
    template: str
    settings: Settings


def write_controls(request: ControlConfig, out: Path, *, overwrite: bool = False) -> list[dict[str, Any]]:
    """Write the controls into `out`/0, `out`/1, … and return their run records; finished ones are not made again.

    An interrupted one goes on where it was and ends with the same bits. Raises UserError where no base or no recipe is
    known, for a base that the original cannot have been made of, for an unlearned model in the place of the original,
    and for a folder that holds another run (unless `overwrite`).
    """
    original = ModelRef.open(request.original, LoadOptions(request.device))
    recipe = _recipe(request, original)
    examples = [example for role in request.roles for example in request.benchmark.split(role).examples]
    said = _said(request, original, recipe)
    with locked(out):
        return [_control(recipe, original, examples, said, out / str(i), i, overwrite) for i in range(request.seeds)]


def _control(
    recipe: Recipe,
    original: ModelRef,
    examples: Sequence[Example],
    said: Mapping[str, Any],
    folder: Path,
    place: int,
    overwrite: bool,
) -> dict[str, Any]:
    """Return the record of one control, which is made unless the folder holds it."""
    settings = replace(recipe.settings, seed=recipe.settings.seed + place)
    texts = [(e.prompt, e.answer) for e in examples]
    plan = digest(recipe.base.fingerprint, recipe.objective, recipe.template, asdict(settings), texts)
    made = None if overwrite else run_record.read(folder)
    if made is not None and made.get("plan") == plan:
        return made
    return write_finetuned(
        recipe.base,
        examples,
        recipe.template,
        settings,
        folder,
        overwrite=overwrite,
        objective=recipe.objective,
        reader=original,
        said={**said, "plan": plan},
    )


def _said(request: ControlConfig, original: ModelRef, recipe: Recipe) -> dict[str, Any]:
    """Return what a control's run record says of it besides how it was trained."""
    return {
        "control of": original.name,
        "original's fingerprint": original.fingerprint,
        "never taught": f"the forget split of {request.benchmark.spec}, by this training",
        "benchmark": request.benchmark.spec,
        "roles": list(request.roles),
        "template": recipe.template,
        "objective": recipe.objective,
    }


def _recipe(request: ControlConfig, original: ModelRef) -> Recipe:
    record = run_record.read(original.path) or {}
    if "method" in record:
        raise UserError(
            f"{original.name} was unlearned from {record.get('model')}, and no control is made of it",
            "give the model before unlearning in its place",
        )
    name = request.base or (record.get("model") if "fine-tuned on" in record else None)
    if name is None:
        raise UserError(
            f"what {original.name} was before it was fine-tuned is not known",
            "name that checkpoint with `base`; where there is none, audit without a control: facts with placebos are "
            "then judged by these",
        )
    base = ModelRef.open(str(name), LoadOptions(request.device))
    if base.fingerprint == original.fingerprint:
        raise UserError(f"{base.name} is the original itself", "name with `base` what it was fine-tuned from")
    require_same_shapes(original, base)
    template = request.template or record.get("template") or request.benchmark.template
    return Recipe(base, record.get("objective", "nll"), template, _settings(request, original, record))


def _settings(request: ControlConfig, original: ModelRef, record: Mapping[str, Any]) -> Settings:
    """Return the original's settings as far as its record holds them, with what is given in their place."""
    known = {item.name for item in fields(Settings)}
    recorded = {name: value for name, value in record.get("settings", {}).items() if name in known}
    chosen = {**recorded, **request.settings}
    if "lr" not in chosen or not any(chosen.get(name) for name in LENGTHS):
        raise UserError(
            f"how {original.name} was fine-tuned is not known: it has no run record",
            "give its recipe: `lr`, and `epochs` or `max_steps`",
        )
    return Settings(**chosen)


def control_words(records: Sequence[Mapping[str, Any]]) -> str:
    """Say what was made: one line for each control."""
    lines = [
        f"{record['path']}: {record['model']} fine-tuned on {record['fine-tuned on']} ({', '.join(record['roles'])}), "
        f"seed {record['settings']['seed']}, {record['fit']['steps']} steps"
        for record in records
    ]
    return "\n".join(lines)
