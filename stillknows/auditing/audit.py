"""Models x variants x splits -> saved observations -> cells and verdicts. An interrupted audit resumes where it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from stillknows.auditing import evidence, harness
from stillknows.auditing.asking import Reader
from stillknows.auditing.evidence import Place, Table
from stillknows.auditing.observe import observe
from stillknows.auditing.plan import LeftOut, Prepared, Request, plan
from stillknows.auditing.variants import Variant
from stillknows.auditing.verdict import judge, out_of_reach
from stillknows.errors import UserError
from stillknows.formats import compress, tally
from stillknows.lazy import Tensor
from stillknows.model import checkpoints, records
from stillknows.model.text import CHAT, Asked
from stillknows.observations import load_observations, save_observations
from stillknows.progress import progress, say
from stillknows.store import Serialized, key, name_of, recall, write_sealed
from stillknows.types import FULL, ORIGINAL, UNWRAPPED, WEIGHTS, Cell, Interval, Observations, Subject, Verdict

OBSERVATIONS_VERSION = 3  # raise when observe() or its inputs change their meaning
TASKS = "tasks"  # in the place of a split's name: the file of general utility


@dataclass(frozen=True)
class Audit:
    """The outcome: what was seen, the numbers made of it, the verdicts."""

    request: Request
    sources: Mapping[str, checkpoints.Source]
    fingerprints: Mapping[str, str]
    records: Mapping[str, dict[str, Any] | None]
    versions: Mapping[str, str]
    observations: Mapping[Place, Observations]
    table: Table
    cells: tuple[Cell, ...]
    verdicts: tuple[Verdict, ...]
    left_out: tuple[LeftOut, ...] = ()
    suppressions: Mapping[str, str] = field(default_factory=dict)


def run(request: Request, out: Path) -> Audit:
    """Measure everything that `out` does not hold yet and judge. Raises UserError for bad input, before loading."""
    prepared, reader, variants, left_out, metrics, figures, suite = plan(request, out)
    if reasons := out_of_reach(request.benchmark, variants, request.control is not None, request.policy):
        say(reasons)
    run_records = {model.label: records.read(model.source.path) for model in prepared}
    versions = records.versions() | ({} if suite is None else {"lm-eval": suite.version})
    deployments = {name: variant for name, variant in variants.items() if variant.role == "deployment"}
    keys = _Keys()
    load, measured = _Loader(request.device, reader, [variant.chain for variant in variants.values()]), []
    for model in prepared:
        if model.label != ORIGINAL:
            measured += _updates(load, prepared[0], model, deployments, out)
        _observe_missing(load, model, variants, keys, out)
        if suite is not None:
            measured += _general(load, model, deployments, suite, request, out)
    observations = {
        Place(model.label, name, split): _read(out, model, name, split, keys(model, variant, split))
        for model in prepared
        for name, variant in variants.items()
        for split in model.items(variant)
    }
    table = evidence.tabulate(observations, metrics, {s.name: s.role for s in request.benchmark.splits})
    labels = [model.label for model in prepared]
    cells = [cell for label in labels for cell in evidence.cells(table, label, variants, metrics)]
    cells += [cell for label in labels for cell in evidence.suite_cells(observations, label, deployments, figures)]
    verdicts = tuple(_judged(table, model, prepared[0], variants, request) for model in prepared)
    return Audit(
        request,
        {p.label: p.source for p in prepared},
        {p.label: p.fingerprint for p in prepared},
        run_records,
        versions,
        observations,
        table,
        (*cells, *measured),
        verdicts,
        left_out,
        {p.label: p.suppression.bound.spec for p in prepared if p.suppression},
    )


def _judged(
    table: Table, model: Prepared, original: Prepared, variants: Mapping[str, Variant], request: Request
) -> Verdict:
    """Return the verdict, which says first if something but the weights was changed."""
    attacks = {name: v.gates(request.policy.gates) for name, v in variants.items() if v.role == "attack"}
    verdict = judge(table, model.label, list(variants), request.policy, attacks)
    verdict = replace(verdict, reasons=(*verdict.reasons, *model.notes))
    if model.suppression is None:
        return verdict
    whose = "the original's" if model.fingerprint == original.fingerprint else f"those of {model.source.name}"
    plain = (
        f"suppression by {model.suppression.bound.spec}: the weights are {whose}, measured by themselves as {UNWRAPPED}"
    )
    return replace(verdict, reasons=(plain, *verdict.reasons))


def _file(out: Path, model: Prepared, variant: str, split: str) -> Path:
    if variant == UNWRAPPED and model.suppression is None:
        variant = FULL
    return out / "observations" / model.label / name_of(variant) / f"{split}.npz"


def _read(out: Path, model: Prepared, variant: str, split: str, cache: str) -> Observations:
    seen = load_observations(_file(out, model, variant, split), cache)
    if seen is None:
        raise UserError(f"{_file(out, model, variant, split)} vanished while the audit ran", "run it again")
    return seen


class _Keys:
    """Identify observations by everything that they depend on; items are written out once for all variants."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, bool, str, str], Serialized] = {}

    def __call__(self, model: Prepared, variant: Variant, split: str) -> str:
        place = model.label, variant.wrapped, variant.asking, split
        if place not in self.items:
            self.items[place] = Serialized.of([_described(item) for item in model.candidates(variant, split)])
        fields, decoding = model.observed(variant, split)
        suppression = model.suppressed(variant)
        beside = [suppression.identity] if suppression else []
        how = sorted(fields), asdict(decoding)
        taught = [[item.ids for item in model.taught(variant)]] if variant.teaches else []
        parts = OBSERVATIONS_VERSION, model.fingerprint, variant.identity, self.items[place], how, *beside
        return key(*parts, *model.beside, *taught)


def _described(item: Asked) -> dict[str, Any]:
    """Return everything of an item, its wording where it has one."""
    return {name: value for name, value in asdict(item).items() if name != "wording" or value}


class _Loader:
    """Keeps the model that was asked for last, so that models are loaded when needed, once, and one at a time.

    All of them get the original's tokenizer and end generations as it does. Updates are compared with a copy of the
    original's weights that `chains` apply to, kept as well once it is needed.
    """

    def __init__(self, device: str, reader: Reader, chains: Sequence[compress.Chain]) -> None:
        self.device, self.reader, self.chains = device, reader, chains
        self.latest: Subject | None = None
        self.originals: dict[str, Tensor] = {}

    def __call__(self, model: Prepared) -> Subject:
        if self.latest is None or self.latest.name != model.label:
            self.latest = None
            found = checkpoints.load(model.source, label=model.label, device=self.device)
            self.latest = replace(found, tokenizer=self.reader.tokenizer)
            if found.model.generation_config is not None:
                found.model.generation_config.eos_token_id = sorted(self.reader.ends)
        return self.latest

    def original_weights(self, original: Prepared) -> dict[str, Tensor]:
        self.originals = self.originals or compress.weights(self(original).model, *self.chains)
        return self.originals


def _observe_missing(load: _Loader, model: Prepared, variants: Mapping[str, Variant], keys: _Keys, out: Path) -> None:
    """Make the observations of one model that the folder does not hold yet, one file after another."""
    todo = {
        name: [
            split
            for split in model.items(variant)
            if load_observations(_file(out, model, name, split), keys(model, variant, split)) is None
        ]
        for name, variant in variants.items()
        if variant.wrapped or model.suppression or FULL not in variants
    }
    with progress(f"observing {model.label}", sum(map(len, todo.values()))) as advance:
        for name, splits in todo.items():
            if not splits:
                continue
            subject, variant = load(model), variants[name]
            suppression = model.suppressed(variant)
            with variant.applied(subject.model, model.taught(variant)):
                served = suppression.wrap(subject.model, load.device) if suppression else subject.model
                for split in splits:
                    fields, decoding = model.observed(variant, split)
                    items = model.asked(variant, split, subject.model)
                    seen = observe(served, subject.tokenizer, items, fields=fields, decoding=decoding)
                    save_observations(_file(out, model, name, split), keys(model, variant, split), seen)
                    advance(1, f"{name}, {split}")


def _updates(
    load: _Loader, original: Prepared, model: Prepared, variants: Mapping[str, Variant], out: Path
) -> Iterator[Cell]:
    """Yield what each format leaves of a model's update, as a whole and by layer, measured on the weights alone.

    Of a layer that has no update there is no number, and none is asked for.
    """
    for variant, form in variants.items():
        on_disk = model.source.form or original.source.form
        unknown = on_disk or form.ids_NL is not None
        whole, layers = (None, {}) if unknown else _damage(load, original, model, variant, form, out)
        for name in ("crossing", "surviving"):
            value = getattr(whole, name, None)
            if on_disk:
                result: Interval | str = "the file is quantized: its weights differ by more than the update"
            elif whole is None:
                result = "the format depends on inputs, not on the weights alone"
            elif value is None:
                result = "the weights are the original's"
            else:
                result = Interval(value, value, value, whole.weights)
            yield Cell(model.label, variant, WEIGHTS, f"update.{name}", result)
            for layer, damage in layers.items():
                value = getattr(damage, name)
                if damage.surviving is not None:
                    result = Interval(value, value, value, damage.weights)
                    yield Cell(model.label, variant, WEIGHTS, f"update.{name}.{layer}", result)


class Damage(NamedTuple):
    """What a format leaves of an update; see `tally.Tally`."""

    weights: int
    crossing: float
    surviving: float | None

    @classmethod
    def of(cls, counted: tally.Tally) -> Damage:
        return cls(counted.weights, counted.crossing, counted.surviving)


def _damage(
    load: _Loader, original: Prepared, model: Prepared, variant: str, form: Variant, out: Path
) -> tuple[Damage, dict[str, Damage]]:
    """Return the damage as a whole and by layer."""
    path = _file(out, model, variant, WEIGHTS).with_suffix(".json")
    cache = key(OBSERVATIONS_VERSION, original.fingerprint, model.fingerprint, form.identity)
    found = _read_damage(path, cache)
    if found is None:
        before = load.original_weights(original)
        counted = tally.tallies(load(model).model, before, form.chain)
        layers = {layer: Damage.of(part) for layer, part in tally.by_layer(counted).items()}
        found = Damage.of(tally.total(counted.values())), layers
        saved = {layer: part._asdict() for layer, part in layers.items()}
        write_sealed(path, {"key": cache, "whole": found[0]._asdict(), "layers": saved})
    return found


def _general(
    load: _Loader,
    model: Prepared,
    variants: Mapping[str, Variant],
    suite: harness.Suite,
    request: Request,
    out: Path,
) -> Iterator[Cell]:
    """Yield general utility under each format, with the task in the place of a split."""
    chat = request.benchmark.template == CHAT
    asked = suite.identity, request.task_limit, harness.BATCH_SIZE, harness.SEED, chat
    with progress(f"general tasks on {model.label}", len(variants)) as advance:
        for variant, form in variants.items():
            path = _file(out, model, variant, TASKS).with_suffix(".json")
            cache = key(OBSERVATIONS_VERSION, model.fingerprint, form.identity, asked, *model.beside)
            results = _read_results(path, cache)
            if results is None:
                subject = load(model)
                with form.applied(subject.model):
                    results = harness.measure(
                        subject.model, subject.tokenizer, suite, limit=request.task_limit, chat=chat
                    )
                write_sealed(path, {"key": cache, "results": [_saved(*result) for result in results.items()]})
            for (task, metric), result in results.items():
                yield Cell(model.label, variant, task, metric, result)
            advance(1, variant)


def _saved(place: tuple[str, str], result: Interval | str) -> dict[str, Any]:
    """Return one result of a task as JSON-able data, with null for a bound that is infinite."""
    found = dict(zip(("task", "metric"), place, strict=True))
    if isinstance(result, str):
        return found | {"not_measured": result}
    return found | {name: value if math.isfinite(value) else None for name, value in result._asdict().items()}


def _read_results(path: Path, cache: str) -> harness.Results | None:
    """Return the results of tasks that were saved under this key; None when there are none."""
    saved = recall(path, cache)
    return None if saved is None else {(row["task"], row["metric"]): _result(row) for row in saved["results"]}


def _result(row: Mapping[str, Any]) -> Interval | str:
    if "not_measured" in row:
        return row["not_measured"]
    low, high = (
        infinity if row[bound] is None else row[bound] for bound, infinity in (("low", -math.inf), ("high", math.inf))
    )
    return Interval(row["value"], low, high, row["n"])


def _read_damage(path: Path, cache: str) -> tuple[Damage, dict[str, Damage]] | None:
    """Return what was saved under this key; None when there is nothing."""
    saved = recall(path, cache)
    if saved is None:
        return None
    return Damage(**saved["whole"]), {layer: Damage(**part) for layer, part in saved["layers"].items()}
