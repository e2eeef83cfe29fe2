"""What an audit will measure: checked, and encoded, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from stillknows import defaults
from stillknows.auditing import comparable, harness, served
from stillknows.auditing.asking import Questions, Reader
from stillknows.auditing.calibration import calibration_tokens
from stillknows.auditing.fact_test import readable_placebos
from stillknows.auditing.facts import ENOUGH_TOLD
from stillknows.auditing.observe import OPTIONAL, PLACEBOS
from stillknows.auditing.policy import Policy, least_facts
from stillknows.auditing.prepared import Prepared
from stillknows.auditing.readings import LeftOut, left_out_of, read_in_variants
from stillknows.auditing.verdict import with_placebos
from stillknows.errors import UserError, first_line
from stillknows.gate.candidates import Placebos
from stillknows.labels import REFERENCE_MODEL, control_labels, is_control, is_reference
from stillknows.model.encoding import LongItems
from stillknows.model.endpoint import Endpoint
from stillknows.model.ref import LoadOptions, ModelRef, require_same_shapes
from stillknows.model.rewriter import Rewriter
from stillknows.progress import log, warn
from stillknows.registry import Bound, bind, bind_all
from stillknows.specs import Specs, spelled
from stillknows.store import read_text, require_outside
from stillknows.types import FULL, ORIGINAL, SUITE, UNDEFENDED, WEIGHTS, Benchmark
from stillknows.variants import defences, fitting
from stillknows.variants.defences import Defence
from stillknows.variants.variant import Variant, parse_variant


@dataclass(frozen=True)
class AuditConfig:
    """What to audit. Models are local folders or hub names; `subjects` maps labels to them."""

    original: str
    subjects: Mapping[str, str]
    benchmark: Benchmark
    controls: tuple[str, ...] = ()  # models that were never taught the forget split
    variants: Specs = defaults.VARIANTS  # those of a plan as far as the models allow
    metrics: Specs = defaults.METRICS
    policy: Policy = field(default_factory=Policy)
    long_items: LongItems = "error"
    device: str = "cpu"
    allow_pickle: bool = False
    trust_remote_code: bool = False
    figures: Specs | None = None  # None: those that the benchmark is published with, which then stand here
    tasks: Specs = ()  # of lm-evaluation-harness: general utility, which no verdict rests on
    task_folder: Path | None = None
    task_limit: int | None = None
    calibration: Path | None = None  # a text file for formats that look at inputs; None: the retain split
    placebos: int = defaults.PLACEBOS  # answers that could have been true, scored beside each one to be forgotten
    placebo_file: Path | None = None  # the user's own, by fact
    depth: bool = False  # look at hidden states too
    reference_models: tuple[str, ...] = ()  # never trained on the facts to be forgotten: for membership
    endpoint: Endpoint | None = None  # a model that a server holds, audited beside the subjects
    rewriter: str | None = None  # a model that says questions in other words

    def __post_init__(self) -> None:
        """Keep lists as tuples of specs, however they are given. Raises UserError for text that is no list of them."""
        figures = self.benchmark.figures if self.figures is None else self.figures
        lists = {"variants": self.variants, "metrics": self.metrics, "figures": figures, "tasks": self.tasks}
        one = (self.controls,) if isinstance(self.controls, str) else self.controls
        object.__setattr__(self, "controls", tuple(one or ()))
        for name, given in lists.items():
            object.__setattr__(self, name, spelled(given))

    @property
    def models(self) -> dict[str, str]:
        """All models by label, the controls first, the reference models last: the same pipeline serves them all."""
        controls = zip(control_labels(len(self.controls)), self.controls, strict=True)
        return {ORIGINAL: self.original} | dict(controls) | dict(self.subjects) | self.references

    @property
    def references(self) -> dict[str, str]:
        """The reference models by label."""
        return {f"{REFERENCE_MODEL}-{k}": name for k, name in enumerate(self.reference_models, 1)}


class Plan(NamedTuple):
    """Everything that an audit needs besides the weights. `prepared` begins with the original, whose `reader` serves
    all models."""

    prepared: list[Prepared]
    reader: Reader
    variants: dict[str, Variant]
    left_out: tuple[LeftOut, ...]
    metrics: dict[str, Bound]
    figures: dict[str, Bound]
    suite: harness.Suite | None
    placebos: Placebos | None


def plan(request: AuditConfig, out: Path) -> Plan:
    """Check and encode everything. Raises UserError for bad input."""
    asked = (*request.variants, *(defaults.REWRITTEN if request.rewriter else ()))
    named, wanted_variants = served.wanted(asked, request.endpoint)
    named -= {*defaults.REWRITTEN[1:]} - {*request.variants}
    metrics = bind_all("metric", request.metrics, "example")
    figures = bind_all("metric", request.figures or (), "model")
    _check_request(request, metrics)
    own_defences, refs = _find(request)
    require_outside(out, [folder for ref in refs.values() for folder in ref.folders])
    fields = _fields(request, [*metrics.values(), *figures.values()])
    prepared, reader, questions = _prepare(request, fields, own_defences, refs)
    questions = replace(questions, rewriter=Rewriter(request.rewriter or "", out, refs[ORIGINAL].options))
    _check_models(prepared)
    subjects = [model for model in prepared if model.label in request.subjects]
    if request.variants == spelled(defaults.VARIANTS) and subjects and all(model.ref.packing for model in subjects):
        wanted_variants = {name: v for name, v in wanted_variants.items() if name == FULL or v.role == "attack"}
        log("quantized files are measured as they are; `variants` names what is done to them, and to the controls, too")
    asked = served.askable(wanted_variants, request.endpoint)
    variants, left_out = _fitted(request, prepared[0], asked, named, questions.placebos)
    left_out += tuple(left_out_of(name, served.NO_WEIGHTS) for name in wanted_variants if name not in asked)
    prepared = served.with_served(request.endpoint, prepared, questions, reader)
    if own_defences:
        variants[UNDEFENDED] = parse_variant(FULL)._replace(defended=False)
    prepared, impossible = read_in_variants(prepared, variants, named, questions, reader)
    left_out = (*left_out, *(left_out_of(name, because) for name, because in impossible.items()))
    variants = {name: variant for name, variant in variants.items() if name not in impossible}
    if (request.depth or request.reference_models) and FULL not in variants:
        raise UserError("`depth` and `reference_models` are for full precision", f"add {FULL} to `variants`")
    judging = {
        gate: bind("metric", gate, "example") for v in variants.values() for gate in v.gates(request.policy.gates)
    }
    metrics |= {gate: metric for gate, metric in judging.items() if gate not in metrics}
    return Plan(prepared, reader, variants, left_out, metrics, figures, _suite(request), questions.placebos)


def _check_request(request: AuditConfig, metrics: Mapping[str, Bound]) -> None:
    request.benchmark.require_usable()
    if not any(split.role == "forget" for split in request.benchmark.splits):
        raise UserError(f"{request.benchmark.spec} measures no split to forget", "choose another benchmark")
    policy = request.policy
    for name in {*policy.gates, policy.utility} - metrics.keys():
        raise UserError(
            f"the verdict needs the metric {name!r}", f"add it to `metrics`, now {','.join(request.metrics)}"
        )
    if request.tasks and any(defences.read(Path(name)) for name in request.subjects.values()):
        raise UserError("general tasks would not be asked through a defence", "leave out `tasks`")
    for label in request.subjects:
        if is_reference(label) or label in request.references:
            raise UserError(f"a model named {label!r} would be taken for the {label}", "rename its folder")
    served.require_possible(request.endpoint, bool(request.tasks), request.depth)
    if request.calibration is not None:
        read_text(request.calibration)
    if request.tasks:
        harness.check(request.task_folder)
    elif request.task_folder or request.task_limit:
        raise UserError("no general task is named", f"add `tasks`, such as {','.join(harness.GENERAL[:2])}")


def _check_models(prepared: Sequence[Prepared]) -> None:
    """Check what concerns all models together."""
    original = prepared[0]
    for model in prepared[1:]:
        require_same_shapes(original.ref, model.ref)
        comparable.require_same_settings(original.ref, model.ref)
        if is_control(model.label) and model.fingerprint == original.fingerprint:
            raise UserError(
                f"{original.ref.name} and {model.ref.name} are the same model, given as original and as control",
                "the control must never have been taught the forget split; leave out `controls` if there is none",
            )
    controls = {model.fingerprint for model in prepared if is_control(model.label)}
    for model in prepared[1:]:
        if not is_control(model.label) and model.fingerprint in controls:
            warn(
                f"{model.label} is given as its own control: nothing that it knows is seen by a comparison with itself"
            )


def _fields(request: AuditConfig, measures: Sequence[Bound]) -> dict[str, frozenset[str]]:
    """Say for each split what has to be observed for these measures.

    What is to be forgotten is always continued, for a reader to see; everything else only where it is read.
    """
    read = OPTIONAL & {name for measure in measures for name in measure.plugin.fields}
    forget = read | {"generations"} | (PLACEBOS if request.placebos else frozenset())
    return {s.name: forget if s.role == "forget" else read for s in request.benchmark.splits}


def _find(request: AuditConfig) -> tuple[dict[str, Defence], dict[str, ModelRef]]:
    """Return by label the defences, and the models as far as their files tell, before torch is imported."""
    options = LoadOptions(
        request.device, allow_pickle=request.allow_pickle, trust_remote_code=request.trust_remote_code
    )
    read = {label: defences.read(Path(name), request.device) for label, name in request.subjects.items()}
    defended = {label: found for label, found in read.items() if found}
    models = request.models | {label: found.model for label, found in defended.items()}
    own = {label: found.defence for label, found in defended.items()}
    return own, {label: ModelRef.open(name, options, packed=True) for label, name in models.items()}


def _prepare(
    request: AuditConfig,
    fields: dict[str, frozenset[str]],
    own_defences: Mapping[str, Defence],
    refs: Mapping[str, ModelRef],
) -> tuple[list[Prepared], Reader, Questions]:
    """Return the models with their items, which all of them read in the same way, the original's reader and what it was
    given."""
    for ref in refs.values():
        ref.check()
    readers = {label: Reader.of(ref) for label, ref in refs.items()}
    original = readers[ORIGINAL]
    questions = Questions(
        request.benchmark,
        request.long_items,
        context=min(ref.context_length for ref in refs.values()),
        tokens=min(ref.vocabulary_size for ref in refs.values()),
        lowered=frozenset(name for name, read in fields.items() if "lowered_log_probs" in read),
    )
    if any(PLACEBOS & read for read in fields.values()):
        questions = replace(
            questions,
            placebos=readable_placebos(
                request.benchmark, original.tokenizer, questions.tokens, request.placebos, request.placebo_file
            ),
        )
    items = questions.encoded(original.tokenizer)
    decoding = {split.name: split.decoding for split in request.benchmark.splits}
    prepared = []
    for label, reader in readers.items():
        own = own_defences.get(label)
        comparable.require_same_vocabulary(original, reader)
        comparable.require_same_tokens(questions, original, reader, items)
        if own:
            asked = questions.encoded(original.tokenizer, [own])
            comparable.require_same_tokens(questions, original, reader, asked, [own])
        model = Prepared(label, refs[label], reader.fingerprint, decoding, fields, defence=own)
        model = model._replace(
            notes=comparable.notes(original, reader, in_chat=questions.in_chat),
            beside=() if reader.identity == original.identity else (original.identity,),
        )
        prepared.append(model)
    return prepared, original, questions


def _fitted(
    request: AuditConfig,
    original: Prepared,
    wanted: Mapping[str, Variant],
    named: frozenset[str],
    answers: Placebos | None,
) -> tuple[dict[str, Variant], tuple[LeftOut, ...]]:
    """Check every variant's formats against the model's layers and give them the calibration tokens that they need.

    One whose group is too wide takes the largest usual one that fits, and is called after it, unless the user named it
    with options. One that is not possible is left out, and told, unless the user named it: then UserError is raised.
    """
    skeleton, calibrated = (
        original.ref.skeleton,
        calibration_tokens(request.benchmark, request.calibration, original.ref),
    )
    variants, left_out = {}, []
    for name, variant in wanted.items():
        try:
            if name not in named:
                _require_decidable(variant, request, answers)
            formats = "+".join(link.spec for link in variant.chain) or name
            fitted = variant.with_formats(fitting.fitted(skeleton, variant.chain, formats, exact=name in named)[1])
            new_name = name if fitted == variant else fitted.spec
            variants[new_name] = fitted._replace(ids_NL=calibrated(new_name, fitted.chain))
        except UserError as error:
            if name in named:
                raise
            left_out.append(left_out_of(name, first_line(error).removeprefix(f"{name}: ")))
    return variants, tuple(left_out)


def _require_decidable(variant: Variant, request: AuditConfig, answers: Placebos | None) -> None:
    """Raise UserError for a variant that teaches facts where too few are left to be asked to find one forgotten, and
    too few of these have placebos to be judged one by one."""
    if not variant.teaches:
        return
    splits, least = [s for s in request.benchmark.splits if s.role == "forget"], least_facts(request.policy.tolerance)
    taught = variant.taught_facts(splits)
    for split in splits:
        left = len({e.fact for e in split.examples} - taught)
        if left < least and with_placebos(split, answers, bool(request.controls)) < ENOUGH_TOLD:
            what = f"it teaches facts and leaves {left} of the {split.name} split to be asked, fewer than {least}"
            raise UserError(what, "name it, to try it all the same")


def _suite(request: AuditConfig) -> harness.Suite | None:
    """Load the general tasks with their documents; None when none is asked for."""
    if not request.tasks:
        return None
    suite = harness.load(request.tasks, include=request.task_folder)
    taken = {split.name for split in request.benchmark.splits} | {SUITE, WEIGHTS}
    for name in taken.intersection([*suite.tasks, *suite.groups]):
        raise UserError(f"the task {name!r} is called like a part of the report", "give it another name")
    return suite
