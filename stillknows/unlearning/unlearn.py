"""One unlearning request: a method text, a model, a benchmark -> a checkpoint with its run record."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from stillknows import __version__, defaults
from stillknows.lazy import nn, torch
from stillknows.model import adapter_folder, modelfiles, parameters, run_record
from stillknows.model.encoding import EncodedAnswer, encode_split, without_end
from stillknows.model.finding import local_folders
from stillknows.model.layers import layer_number, matching
from stillknows.model.ref import LoadOptions, ModelRef, require_same_shapes
from stillknows.progress import log, warn
from stillknows.store import RECORD, REPORT, digest, locked, require_new, require_outside
from stillknows.training import low_rank, step_pipeline
from stillknows.training.checkpoint import CHECKPOINT
from stillknows.training.loop import FitResult
from stillknows.types import Benchmark, Example, Role
from stillknows.unlearning import alternative_answers, estimate, goal, sequence
from stillknows.unlearning.execution import RANGE_TEST, Work, carry_out, companions_of
from stillknows.unlearning.method import Method
from stillknows.unlearning.request import UnlearnConfig, check_request, first_words, split_of
from stillknows.variants.compress import parse_variant
from stillknows.variants.fitting import check_fixed


def unlearn(request: UnlearnConfig, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Unlearn and write the checkpoint with run.json; return the record.

    Weights that were kept in bfloat16 are saved as such, exactly, others in float32. `resume` continues an interrupted
    run from its last checkpoint and ends with the weights that it would have had.

    Raises UserError for bad input (before the model is loaded where it can be seen there), for an `out` inside the
    model's folder and for one that holds a finished run or another model (unless `overwrite`) or an unfinished run
    (unless `resume` or `overwrite`).
    """
    prepared = _checked(request, out, overwrite, resume)
    with locked(out):
        _require_free(request, out, overwrite, resume)
        return _run(request, prepared, out, out / CHECKPOINT, resume)


def estimated(request: UnlearnConfig, out: Path, *, overwrite: bool = False, resume: bool = False) -> estimate.Estimate:
    """Return what `unlearn` with the same arguments will take. No weights are loaded, and nothing is written.

    Raises UserError as `unlearn` does before it loads the model, and for a run that takes more memory than is free,
    with the option under which it would fit.
    """
    prepared = _checked(request, out, overwrite, resume)
    work, skeleton, device = prepared.work, prepared.source.skeleton, request.device
    found = estimate.of_run(work, skeleton, device, request.save, estimate.speed(skeleton, device))
    estimate.require_room(found, work, skeleton, device)
    return found


def _checked(request: UnlearnConfig, out: Path, overwrite: bool, resume: bool) -> _Prepared:
    """Check everything that can be checked without the weights."""
    chosen = check_request(request)
    _require_free(request, out, overwrite, resume)
    log(first_words(request))
    prepared = _prepare(request, chosen)
    require_outside(out, [*prepared.base.folders, *prepared.source.folders])
    return prepared


def _require_free(request: UnlearnConfig, out: Path, overwrite: bool, resume: bool) -> None:
    """Raise UserError for an `out` that lies in a model's folder, or holds a run or a model that is to be kept."""
    require_outside(out, local_folders(request.model, *([] if request.after is None else [str(request.after)])))
    checkpoint = out / CHECKPOINT
    require_new(out / RECORD, overwrite=overwrite)
    require_new(out / REPORT, overwrite=False, fix="choose another `out`: this one holds an audit")
    require_new(checkpoint, overwrite=overwrite or resume, fix="continue it with `resume`, or add `overwrite`")
    for path in modelfiles.present(out):
        require_new(path, overwrite=overwrite or checkpoint.exists())


class _Prepared(NamedTuple):
    """Everything that a run needs besides the weights. It starts from `source`; the first request did from `base`."""

    base: ModelRef
    source: ModelRef
    earlier: sequence.RequestHistory
    work: Work


def _prepare(request: UnlearnConfig, chosen: Method) -> _Prepared:
    """Check everything else that can be checked without the weights."""
    benchmark = request.benchmark
    base, source, earlier = _start(request)
    if request.save == "adapter" and source.adapter is not None:
        source.adapter.updates()  # can be added to
    skeleton = copy.deepcopy(source.skeleton)  # adapters change it
    _check_names(chosen, skeleton)
    tokenizer, context, vocabulary = source.tokenizer, source.context_length, source.vocabulary_size

    def encoded(role: Role) -> list[EncodedAnswer]:
        split = split_of(benchmark, role)
        how = (tokenizer, benchmark.template, context, request.long_items, vocabulary)
        return [] if split is None else [asked.answer for asked in encode_split(split, *how)]

    forget, retain = encoded("forget"), encoded("retain")
    if request.until_forgotten:
        goal.require_questions(forget, benchmark.spec)
    for kind, items in (("forget", forget), ("retain", retain)):
        alternative_answers.check(items, companions_of(chosen, kind), retain, benchmark.spec)
    step_pipeline.check(chosen.step_plugins, skeleton, len(forget))
    answering = alternative_answers.Answering(
        tokenizer, benchmark.template, context, request.settings.seed, request.long_items
    )
    if request.until_forgotten:  # it keeps neighbours too, so it trains on them
        retain += encoded("neighbour")
    settings = goal.settings_for(request.settings) if request.until_forgotten else request.settings
    forget, refusals = without_end(forget), _refusals(benchmark, chosen)
    wordings = _other_wordings(benchmark, forget) if request.until_forgotten else None
    controls = _controls(request, source) if request.until_forgotten else ()
    work = Work(chosen, answering, settings, request.find_rate, wordings, forget, retain, refusals, controls)
    return _Prepared(base, source, earlier, work)


def _controls(request: UnlearnConfig, source: ModelRef) -> list[ModelRef]:
    """Return the never-taught models, checked. Raises UserError for one that is no version of the model."""
    options = LoadOptions(
        request.device, allow_pickle=request.allow_pickle, trust_remote_code=request.trust_remote_code
    )
    found = [ModelRef.open(name, options).check() for name in request.controls]
    for control in found:
        require_same_shapes(source, control)
    return found


def _other_wordings(benchmark: Benchmark, forget: Sequence[EncodedAnswer]) -> list[list[Example]]:
    """Return the questions of the splits to forget that are not trained on, by split."""
    trained = {item.example.prompt for item in forget}
    splits = [split.examples for split in benchmark.splits if split.role == "forget"]
    return [found for examples in splits if (found := [e for e in examples if e.prompt and e.prompt not in trained])]


def _refusals(benchmark: Benchmark, chosen: Method) -> tuple[str, ...]:
    """Return the refusals that a method trains with: the benchmark's, or the built-in ones, which is told."""
    if "refusal" not in companions_of(chosen, "forget") | companions_of(chosen, "retain"):
        return ()
    if not benchmark.refusals:
        count = len(defaults.REFUSALS)
        warn(f"{benchmark.spec} brings no refusals: {count} built-in ones are used; give others with `refusals`")
    return benchmark.refusals or defaults.REFUSALS


def _start(request: UnlearnConfig) -> tuple[ModelRef, ModelRef, sequence.RequestHistory]:
    """Return the model that the first request began with, the one to start from, and the requests between them."""
    options = LoadOptions(
        request.device, allow_pickle=request.allow_pickle, trust_remote_code=request.trust_remote_code
    )
    base = ModelRef.open(request.model, options)
    source = base if request.after is None else ModelRef.open(str(request.after), options)
    original = base.fingerprint
    earlier = sequence.RequestHistory(original)
    if request.after is not None:
        earlier = sequence.follow(request.after, original, base.name)
    earlier.require_compatible(request.benchmark)
    return base.check(), source.check(), earlier


def _check_names(chosen: Method, skeleton: nn.Module) -> None:
    """Raise UserError for layers, tensors and shapes that the model lacks and that an option names."""
    names = [name for name, _ in skeleton.named_parameters()]
    for part in chosen.parts:
        if "layer" in part.options:
            layer_number(skeleton, part.options["layer"])
        if part.plugin.kind == "edit" and "names" in part.options:
            matching(names, part.options["names"])
        if part.plugin.kind == "edit" and "format" in part.options:
            check_fixed(skeleton, parse_variant(part.options["format"]), part.spec)


def _run(request: UnlearnConfig, prepared: _Prepared, out: Path, checkpoint: Path, resume: bool) -> dict[str, Any]:
    work, settings = prepared.work, prepared.work.settings
    target = prepared.source.load()
    if not resume:
        _remove_progress(checkpoint)
    plan = {
        "model": target.fingerprint,
        "method": [part.identity for part in work.method.parts],
        "settings": asdict(settings) | {"save_seconds": 0},
        "items": digest([[(item.ids, item.start) for item in items] for items in (work.forget, work.retain)]),
    }
    if work.refusals:
        plan["refusals"] = digest(work.refusals)
    dtype = torch.float32 if settings.weights == "float32" else torch.bfloat16
    before = parameters.checksums(target.model, dtype)
    if request.find_rate or request.until_forgotten:
        plan["found"] = [request.find_rate, request.until_forgotten]
    if work.controls:
        plan["controls"] = [control.fingerprint for control in work.controls]
    added: dict[str, nn.Module] = {}
    if request.save == "adapter":
        work = work._replace(method=work.method.with_steps(lambda part: low_rank.collecting(part, added)))
    outcome, choice = carry_out(work, target.model, checkpoint, digest(plan))
    if parameters.checksums(target.model, dtype) == before:
        warn("nothing was unlearned: no weight differs from the model's; raise `lr`, or set more steps")
    items = [*work.forget, *work.retain]
    record = _record(request, plan, outcome, truncated=sum(item.truncated for item in items)) | choice
    record["request"] = prepared.earlier.record(request.benchmark, outcome)
    tokenizer = work.answering.tokenizer
    if request.save == "adapter":
        updates = low_rank.updates(added, target.model)
        written = adapter_folder.save(target.model, updates, prepared.source, tokenizer, out, record)
    else:
        written = run_record.save(target.model, tokenizer, out, record, dtype)
    _remove_progress(checkpoint)
    return written


def _remove_progress(checkpoint: Path) -> None:
    for path in (checkpoint, checkpoint.with_name(RANGE_TEST)):
        path.unlink(missing_ok=True)


def _record(request: UnlearnConfig, plan: dict[str, Any], outcome: FitResult, truncated: int) -> dict[str, Any]:
    """Everything that is needed to repeat the run and to know what it cost."""
    return {
        "stillknows": __version__,
        "model": request.model,
        "benchmark": request.benchmark.spec,
        "template": request.benchmark.template,
        "controls": list(request.controls),
        "method": request.method,
        "save": request.save,
        "plan": plan,
        "fit": outcome.to_json(),
        "truncated_items": truncated,
        "versions": run_record.versions(),
    }
