"""One unlearning request: a method text, a model, a benchmark -> a checkpoint with its run record."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from stillknows import __version__, defaults
from stillknows.errors import UserError
from stillknows.lazy import nn, torch
from stillknows.model import modelfiles, parameters, run_record
from stillknows.model.encoding import EncodedAnswer, LongItems, encode_split, without_end
from stillknows.model.finding import local_folders
from stillknows.model.layers import layer_number, matching
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.model.saving import require_finite_result
from stillknows.progress import warn
from stillknows.store import RECORD, digest, locked, require_new, require_outside
from stillknows.training import step_pipeline
from stillknows.training.cost import CostMeter, peak_memory
from stillknows.training.finetune import finetune
from stillknows.training.loop import FitResult, fit
from stillknows.training.objective_inputs import Term
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Role, Split
from stillknows.unlearning import alternative_answers, method, sequence
from stillknows.unlearning.method import Method
from stillknows.variants.compress import parse_variant
from stillknows.variants.fitting import check_fixed

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class UnlearnConfig:
    """What to unlearn and how. `model` is a local folder or a hub name; a request may follow another, whose run is in
    the folder `after`: it then starts from that run's checkpoint, and `model` is what the first request began with."""

    model: str
    benchmark: Benchmark
    method: str
    settings: Settings
    long_items: LongItems = "error"
    device: str = "cpu"
    allow_pickle: bool = False
    trust_remote_code: bool = False
    after: Path | None = None


def unlearn(request: UnlearnConfig, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Unlearn and write the checkpoint with run.json; return the record.

    Weights that were kept in bfloat16 are saved as such, exactly, others in float32. `resume` continues an interrupted
    run from its last checkpoint and ends with the weights that it would have had.

    Raises UserError for bad input (before the model is loaded where it can be seen there), for an `out` inside the
    model's folder and for one that holds a finished run or another model (unless `overwrite`) or an unfinished run
    (unless `resume` or `overwrite`).
    """
    chosen = _check_request(request)
    _require_free(request, out, overwrite, resume)
    prepared = _prepare(request, chosen)
    require_outside(out, [prepared.base.folder, prepared.source.folder])
    with locked(out):
        _require_free(request, out, overwrite, resume)
        return _run(request, prepared, out, out / CHECKPOINT, resume)


def _check_request(request: UnlearnConfig) -> Method:
    """Check what the request alone can tell, before torch is imported; return the method."""
    chosen = method.parse(request.method)
    request.benchmark.require_usable()
    _check_splits(request, chosen)
    request.settings.steps(len(request.benchmark.split("forget").examples))
    return chosen


def _require_free(request: UnlearnConfig, out: Path, overwrite: bool, resume: bool) -> None:
    """Raise UserError for an `out` that lies in a model's folder, or holds a run or a model that is to be kept."""
    require_outside(out, local_folders(request.model, *([] if request.after is None else [str(request.after)])))
    checkpoint = out / CHECKPOINT
    require_new(out / RECORD, overwrite=overwrite)
    require_new(checkpoint, overwrite=overwrite or resume, fix="continue it with `resume`, or add `overwrite`")
    for path in modelfiles.present(out):
        require_new(path, overwrite=overwrite or checkpoint.exists())


class _Prepared(NamedTuple):
    """Everything that a run needs besides the weights. It starts from `source`; the first request did from `base`."""

    method: Method
    base: ModelRef
    source: ModelRef
    earlier: sequence.RequestHistory
    answering: alternative_answers.Answering
    forget: list[EncodedAnswer]
    retain: list[EncodedAnswer]
    refusals: tuple[str, ...]  # none where the method does not train with them


def _prepare(request: UnlearnConfig, chosen: Method) -> _Prepared:
    """Check everything else that can be checked without the weights."""
    benchmark = request.benchmark
    base, source, earlier = _start(request)
    skeleton = copy.deepcopy(source.skeleton)  # adapters change it
    _check_names(chosen, skeleton)
    tokenizer, context, vocabulary = source.tokenizer, source.context_length, source.vocabulary_size
    forget, retain = (
        []
        if split is None
        else [
            asked.answer
            for asked in encode_split(split, tokenizer, benchmark.template, context, request.long_items, vocabulary)
        ]
        for split in (_split(benchmark, "forget"), _split(benchmark, "retain"))
    )
    for kind, items in (("forget", forget), ("retain", retain)):
        alternative_answers.check(items, _companions(chosen, kind), retain, benchmark.spec)
    step_pipeline.check(chosen.step_plugins, skeleton, len(forget))
    answering = alternative_answers.Answering(tokenizer, benchmark.template, context, request.settings.seed)
    return _Prepared(
        chosen, base, source, earlier, answering, without_end(forget), retain, _refusals(benchmark, chosen)
    )


def _refusals(benchmark: Benchmark, chosen: Method) -> tuple[str, ...]:
    """Return the refusals that a method trains with: the benchmark's, or the built-in ones, which is told."""
    if "refusal" not in _companions(chosen, "forget") | _companions(chosen, "retain"):
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


def _companions(chosen: Method, role: str) -> frozenset[str]:
    found = (replace(chosen, terms=(term,)).companions for term in chosen.terms if term.plugin.role == role)
    edits = {"refusal"} if role == "forget" and chosen.needs("refusals") else ()
    return frozenset(edits).union(*found)


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


def _check_splits(request: UnlearnConfig, chosen: Method) -> None:
    """Raise UserError for a split that the benchmark lacks and that the method, or its early stop, works on."""
    benchmark = request.benchmark
    fix = "choose a benchmark, or options of it, that has one: see `stillknows list benchmarks`"
    if _split(benchmark, "forget") is None:
        raise UserError(f"{benchmark.spec} has no split to forget", fix)
    if _split(benchmark, "retain") is not None:
        return
    if chosen.retains:
        parts = " + ".join(part.spec for part in chosen.retains)
        without = " + ".join(part.spec for part in chosen.parts if part not in chosen.retains)
        raise UserError(
            f"{benchmark.spec} has no split to retain, which {parts} of `method` {chosen.spec!r} needs",
            f"{fix}; or leave that out, as in `method` {without}" if without else fix,
        )
    if request.settings.retain_floor:
        raise UserError(f"{benchmark.spec} has no split to retain that `retain_floor` could watch", "leave it out")


def _split(benchmark: Benchmark, role: Role) -> Split | None:
    try:
        return benchmark.split(role)
    except LookupError:
        return None


def _run(request: UnlearnConfig, prepared: _Prepared, out: Path, checkpoint: Path, resume: bool) -> dict[str, Any]:
    chosen, settings = prepared.method, request.settings
    target = prepared.source.load()
    if not resume:
        checkpoint.unlink(missing_ok=True)
    plan = {
        "model": target.fingerprint,
        "method": [part.identity for part in chosen.parts],
        "settings": asdict(settings) | {"save_seconds": 0},
        "items": digest([[(item.ids, item.start) for item in items] for items in (prepared.forget, prepared.retain)]),
    }
    if prepared.refusals:
        plan["refusals"] = digest(prepared.refusals)
    dtype = torch.float32 if settings.weights == "float32" else torch.bfloat16
    before = parameters.checksums(target.model, dtype)
    outcome = _train(request, prepared, target.model, checkpoint, digest(plan))
    if parameters.checksums(target.model, dtype) == before:
        warn("nothing was unlearned: no weight differs from the model's; raise `lr`, or set more steps")
    items = [*prepared.forget, *prepared.retain]
    record = _record(request, plan, outcome, truncated=sum(item.truncated for item in items))
    record["request"] = prepared.earlier.record(request.benchmark, outcome)
    written = run_record.save(target.model, prepared.answering.tokenizer, out, record, dtype)
    checkpoint.unlink(missing_ok=True)
    return written


def _train(request: UnlearnConfig, prepared: _Prepared, model: nn.Module, checkpoint: Path, plan_key: str) -> FitResult:
    """Change the model in place, as the method says, and return what was done and what all of it cost."""
    chosen, settings = prepared.method, request.settings
    given: dict[str, Any] = {"model": model, "forget": prepared.forget, "retain": prepared.retain, "settings": settings}
    outcome = FitResult(stopped="no loss to descend")
    with CostMeter(model) as preparing:
        terms = _terms(request, prepared, model)
        if chosen.needs("original"):
            given["original"] = parameters.copies(model)
        if chosen.needs("reinforced"):
            given["reinforced"] = _reinforced(model, prepared.forget, settings)
        if chosen.needs("refusals"):
            given["refusals"] = alternative_answers.refusals(prepared.forget, prepared.refusals, prepared.answering)
    if terms:
        outcome = fit(
            model,
            terms,
            settings,
            step_plugins=chosen.step_plugins,
            teachers={name: given[name] for name in ("reinforced",) if name in given},
            monitor=(prepared.forget, prepared.retain),
            checkpoint=checkpoint,
            plan_key=plan_key,
            label=f"unlearning {request.method}",
        )
        require_finite_result(model)
    with CostMeter(model) as editing:
        for edit in chosen.edits:
            edit(**{name: given[name] for name in edit.plugin.needs})
    outcome.add(preparing)
    outcome.add(editing)
    outcome.peak_memory_bytes = peak_memory(next(model.parameters()).device)
    return outcome


def _terms(request: UnlearnConfig, prepared: _Prepared, model: nn.Module) -> list[Term]:
    """Pair each objective with its items and the other answers that it needs."""
    how = prepared.answering
    items = {"forget": prepared.forget, "retain": prepared.retain}
    makers: dict[str, Callable[[list[EncodedAnswer]], list[tuple[EncodedAnswer, ...]]]] = {
        "refusal": lambda found: alternative_answers.refusals(found, prepared.refusals, how),
        "mismatched": lambda found: alternative_answers.mismatched(found, prepared.retain, how),
        "alternative": lambda found: alternative_answers.alternatives(model, found, how),
    }
    others = {
        role: {name: makers[name](found) for name in _companions(prepared.method, role)}
        for role, found in items.items()
    }
    return [Term(term, items[role], others[role]) for term in prepared.method.terms if (role := str(term.plugin.role))]


def _reinforced(model: nn.Module, forget: list[EncodedAnswer], settings: Settings) -> nn.Module:
    """Return a copy of the model that was trained further on the forget items, with the run's own settings."""
    copy_ = copy.deepcopy(model)
    finetune(copy_, forget, settings, label="training a reinforced model")
    return copy_


def _record(request: UnlearnConfig, plan: dict[str, Any], outcome: FitResult, truncated: int) -> dict[str, Any]:
    """Everything that is needed to repeat the run and to know what it cost."""
    return {
        "stillknows": __version__,
        "model": request.model,
        "benchmark": request.benchmark.spec,
        "method": request.method,
        "plan": plan,
        "settings": asdict(request.settings),
        "fit": outcome.to_json(),
        "truncated_items": truncated,
        "versions": run_record.versions(),
    }
