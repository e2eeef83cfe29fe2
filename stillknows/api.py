"""The Python functions. They take what a notebook has at hand, and do what the commands of the same names do.

A model is a folder or a hub name, the result of `unlearn`, or a pair (model, tokenizer) that is loaded already; a pair
is first written to a temporary folder, so that everything after it is done as for any other model. A benchmark is a
name as on the command line, a `Benchmark`, or lists of dictionaries, which are written to temporary files as well:
`{"forget": [{"question": …, "answer": …}], "retain": [{"text": …}]}`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_type_hints

from stillknows import defaults
from stillknows.arguments import require_type, typed
from stillknows.auditing.plan import labels
from stillknows.auditing.verdict import Policy
from stillknows.errors import UserError, blamed_on, did_you_mean
from stillknows.registry import bind
from stillknows.reporting import report
from stillknows.reporting.build import build
from stillknows.results import Report, Unlearned
from stillknows.specs import Specs
from stillknows.store import locked, require_new, write_text
from stillknows.types import Benchmark, Example, Role

if TYPE_CHECKING:
    from stillknows.training.loop import Settings

Model: TypeAlias = str | os.PathLike[str] | tuple[Any, Any]
Rows: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]


@typed
def unlearn(
    model: Model,
    benchmark: str | Benchmark | Rows,
    *,
    out: str | Path | None = None,
    method: str = defaults.METHOD,
    template: str | None = None,
    after: str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Unlearned:
    """Remove the forget split's knowledge from a model and write a new checkpoint; the given model stays as it is.

    Args:
        out: folder for the checkpoint; None makes a temporary one, which is left to the system to remove.
        method: objectives, steps and edits joined by "+": see `stillknows list methods`.
        template: frame of a question with "{prompt}", or "chat" for the tokenizer's own.
        after: folder of an earlier run on `model`, to unlearn more from where it ended.
        settings: how to optimise: see `training.loop.Settings` (`lr`, `epochs`, `max_steps`, `batch_size`, `seed`, …).

    Raises UserError for bad input, before the model is loaded where it can be seen there.
    """
    from stillknows.unlearning import unlearn as unlearning

    request = unlearning.UnlearnConfig(
        _folder(model),
        _benchmark(benchmark, template),
        method,
        _settings(settings),
        device=device,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        after=None if after is None else Path(after),
    )
    folder = _out(out)
    return Unlearned(folder, unlearning.unlearn(request, folder, overwrite=overwrite, resume=resume))


@typed
def audit(
    *models: Model,
    original: Model,
    benchmark: str | Benchmark | Rows,
    controls: Sequence[Model] = (),
    variants: Specs = defaults.VARIANTS,
    metrics: Specs = defaults.METRICS,
    policy: Policy | None = None,
    template: str | None = None,
    out: str | Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    command: str = "stillknows.audit(…)",
    **options: Any,
) -> Report:
    """Find out whether models still know the forget split, in full precision and in every variant.

    Args:
        models: what to judge; saved suppressions and quantized files too.
        original: the model before unlearning, which must show the knowledge.
        controls: a model that was never taught the forget split; without one nothing is decided.
        variants, metrics: a list, or a text as on the command line; default variants that fit no layer are left out.
        policy: what a verdict asks for; the default one when None.
        out: folder for the report and for what was observed, from which an interrupted audit resumes; None makes a
            temporary one, which is left to the system to remove.
        command: what report.json says to type to repeat the audit.
        options: further fields of `auditing.plan.AuditConfig`, such as `figures`, `tasks` or `calibration`.

    Raises UserError for bad input, before any model is loaded where it can be seen there.
    """
    from stillknows.auditing import audit as auditing

    if not models:
        raise UserError("no model to audit is given", "name one: audit(model, original=…, benchmark=…)")
    if len(controls) > 1:
        raise UserError("models are compared with one control", "give one in `controls`")
    _require_fields(auditing.AuditConfig, options)
    request = auditing.AuditConfig(
        original=_folder(original),
        subjects=labels([_folder(model) for model in models]),
        benchmark=_benchmark(benchmark, template),
        control=_folder(controls[0]) if controls else None,
        variants=variants,
        metrics=metrics,
        policy=policy or Policy(),
        device=device,
        **options,
    )
    folder = _out(out)
    with locked(folder):
        require_new(folder / report.JSON, overwrite=overwrite)
        return Report(report.write(build(auditing.audit(request, folder), command), folder))


@typed
def finetune(
    model: Model,
    benchmark: str | Benchmark | Rows,
    *,
    roles: Sequence[Role] = ("forget", "retain"),
    out: str | Path | None = None,
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

    asked = _benchmark(benchmark, template)
    asked.require_usable()
    chosen = _settings(settings)
    examples = [e for role in roles for e in _examples(asked, role)]
    if not examples:
        raise UserError("no items to train on are named", 'give some: roles=("forget", "retain")')
    ref, folder = ModelRef.open(_folder(model), LoadOptions(device)), _out(out)
    return Unlearned(folder, write_finetuned(ref, examples, asked.template, chosen, folder, overwrite=overwrite))


@typed
def quantize(model: Model, to: str, *, out: str | Path, overwrite: bool = False, **options: Any) -> dict[str, Any]:
    """Write a model in a format, as the file that people deploy, and return its record; see `stillknows quantize`.

    Args:
        to: the format, such as "gguf:Q4_K_M" or "nf4".
        options: further fields of `variants.export.ExportConfig`.
    """
    from stillknows.variants import export

    _require_fields(export.ExportConfig, options)
    return export.export(export.ExportConfig(_folder(model), to, **options), Path(out), overwrite=overwrite)


@typed
def diagnose(original: Model, unlearned: Model, formats: Specs = defaults.FORMATS, **options: Any) -> dict[str, Any]:
    """Find out what formats leave of an update to the weights, and why, without running a model.

    See `analysis.diagnose.diagnose` for what is returned.
    """
    from stillknows.analysis import diagnose as diagnosing

    return diagnosing.diagnose(_folder(original), _folder(unlearned), formats, **options)


@typed
def score(folder: str | Path, metrics: Specs = defaults.METRICS, figures: Specs = ()) -> list[dict[str, Any]]:
    """Score what an audit observed by other metrics and figures, without a model; return one row a number."""
    from stillknows.reporting import rescore

    return rescore.saved(Path(folder), metrics, figures)["cells"]


@typed
def load_report(folder: str | Path) -> Report:
    """Return the report that a folder holds. Raises UserError when there is none or when it was changed."""
    return Report(report.read(Path(folder)))


def _examples(benchmark: Benchmark, role: Role) -> tuple[Example, ...]:
    try:
        return benchmark.split(role).examples
    except LookupError as error:
        raise UserError(str(error), "leave that role out") from error


def _folder(model: Model) -> str:
    """Return a model's folder or hub name; a loaded one is written to a temporary folder first."""
    if not isinstance(model, tuple):
        return os.fspath(model)
    from stillknows.model import saving

    loaded, tokenizer = model
    if not hasattr(loaded, "save_pretrained") or not hasattr(loaded, "state_dict"):
        raise UserError(f"{type(loaded).__name__} is no model", "give a folder, or a pair (model, tokenizer)")
    name = Path(str(getattr(loaded, "name_or_path", ""))).name or "model"
    folder = Path(tempfile.mkdtemp(prefix="stillknows-")) / name
    folder.mkdir()
    saving.save(loaded, tokenizer, folder)
    return str(folder)


def _settings(chosen: Mapping[str, Any]) -> Settings:
    from stillknows.training.loop import Settings

    _require_fields(Settings, chosen)
    return replace(Settings(lr=defaults.LR), **chosen)


def _require_fields(request: type, given: Mapping[str, Any]) -> None:
    """Raise UserError for a name that a dataclass does not have, and for a value of another type."""
    known, kinds = [field.name for field in fields(request)], get_type_hints(request)
    for name, value in given.items():
        if name not in known:
            raise UserError(f"there is no option {name!r}{did_you_mean(name, known)}")
        require_type(name, value, kinds[name])


def _out(folder: str | Path | None) -> Path:
    return Path(tempfile.mkdtemp(prefix="stillknows-")) if folder is None else Path(folder)


def _benchmark(what: str | Benchmark | Rows, template: str | None) -> Benchmark:
    if isinstance(what, Mapping):
        what = _written(what)
    found = bind("benchmark", what)() if isinstance(what, str) else what
    return replace(found, template=template) if template else found


def _written(rows: Rows) -> str:
    """Write items into temporary files, one for each role, and return what names them as a benchmark."""
    folder = Path(tempfile.mkdtemp(prefix="stillknows-"))
    for role, items in rows.items():
        with blamed_on(f"the items of {role!r} are no JSON", "give texts, and lists of texts"):
            lines = [json.dumps(item) for item in items]
        write_text(folder / f"{role}.jsonl", "".join(f"{line}\n" for line in lines))
    return "jsonl:" + ",".join(f"{role}={folder / role}.jsonl" for role in rows)
