"""Settings found by search: the audit's worst case is made small, and what must be kept stays.

Every trial unlearns with the settings that Optuna's sampler suggests and is audited in all formats, as any other model.
A search can be interrupted: trials are kept one by one, and what the next one tries depends on the seed, its number and
the trials before it alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from stillknows.auditing import audit
from stillknows.auditing.plan import plan
from stillknows.errors import UserError, did_you_mean
from stillknows.formatting import markdown_table, number, significant
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.options import convert
from stillknows.progress import log
from stillknows.registry import Bound
from stillknows.reporting.build import build
from stillknows.store import digest, locked, read_sealed, remove, require_new, sealed, write_sealed
from stillknows.training.settings import Settings
from stillknows.unlearning import method, unlearn

JSON = "tune.json"
NEEDS_OPTUNA = "pip install 'stillknows[tune]'"
LOG_FROM = 10.0  # a range whose ends are that far apart is searched on a logarithmic scale
Json = dict[str, Any]


class Range(NamedTuple):
    """What a setting may be: one of `choices`, or a number from low to high."""

    name: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class TuneConfig:
    """What to search: an unlearning request, an audit to judge by (without subjects), the ranges and the limits.

    retain_floor: least retain score as a share of the original's, in every format, of a result that counts.
    """

    unlearn: unlearn.UnlearnConfig
    audit: audit.AuditConfig
    ranges: tuple[Range, ...]
    trials: int = 20
    retain_floor: float = 0.95
    seed: int = 0


def parse_range(text: str, method_spec: str) -> Range:
    """Parse "lr=1e-6..1e-4", "epochs=2..10" or "npo.beta=0.05|0.1|0.5". Raises UserError.

    A name is a training setting, or an option of a part of the method as "part.option".
    """
    name, equals, values = text.partition("=")
    name = name.strip()
    kind = _type_of(name, method_spec)
    low, dots, high = values.partition("..")
    if not equals or not values:
        raise UserError(f"`search` {text!r} says no values", f"{name}=LOW..HIGH or {name}=A|B|C")
    if not dots:
        choices = tuple(part.strip() for part in values.split("|"))
        return Range(name, choices=tuple(str(convert(name, choice, kind)) for choice in choices))
    try:
        found = Range(name, float(low), float(high), whole=_is_whole(kind))
    except ValueError:
        raise UserError(f"`search` {text!r}: {low!r} and {high!r} must be numbers") from None
    if not found.low < found.high or not math.isfinite(found.high):
        raise UserError(f"`search` {text!r}: the range is empty", "give LOW..HIGH with LOW below HIGH")
    return found


def _is_whole(kind: Any) -> bool:
    """Tell whether values of an annotated type are whole numbers."""
    return kind is int or any(map(_is_whole, get_args(kind)))


def _type_of(name: str, method_spec: str) -> Any:
    """Return the annotated type of a setting or of a part's option."""
    types = dict(get_type_hints(Settings))
    for part in method.parse(method_spec).parts:
        types |= {f"{part.plugin.name}.{option}": kind for option, kind in part.plugin.types.items()}
    if name not in types:
        raise UserError(f"nothing to search is called {name!r}{did_you_mean(name, types)}", ", ".join(types))
    return types[name]


def tune(request: TuneConfig, out: Path, *, overwrite: bool = False) -> Json:
    """Search, keep the best model under `out`/best, and return all trials with the best one's settings.

    Returns `trials`, each with its settings, `worst` [value, low, high], the largest share of the knowledge that is
    kept in any format by any gate metric (0 as never taught, 1 as the original), `utility`, the least retain score in
    any format as a share of the original's, and whether it is `allowed`; and `best`, the number of the allowed trial
    whose upper bound is least, or None. Its model stays in `out`/trials.

    Raises UserError: no control, Optuna missing, an `out` that holds another search (unless `overwrite`).
    """
    _require_optuna()
    if not request.audit.controls:
        raise UserError("a search needs a never-taught control to judge by", "give one with `controls`")
    with locked(out):
        done = _done(request, out, overwrite)
        plan(request.audit, out)  # what the audits will refuse is said before anything is trained
        for number in range(len(done), request.trials):
            chosen = _suggest(request, done)
            log(f"trial {number + 1} of {request.trials}: " + ", ".join(f"{k}={v}" for k, v in chosen.items()))
            done.append(_trial(request, out, number, chosen))
            write_sealed(out / JSON, _result(request, done))
            _keep_best(out, done)
        return sealed(_result(request, done))


def _require_optuna() -> None:
    try:
        import optuna
    except ImportError as error:
        raise UserError("a search needs Optuna, which is not installed", NEEDS_OPTUNA) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _plan(request: TuneConfig) -> str:
    """Identify a search by what its trials depend on; their number may grow."""
    wanted = request.unlearn
    options = LoadOptions(allow_pickle=wanted.allow_pickle, trust_remote_code=wanted.trust_remote_code)
    return digest(repr(replace(request, trials=0)), ModelRef.open(wanted.model, options).fingerprint)


def _done(request: TuneConfig, out: Path, overwrite: bool) -> list[Json]:
    """Return the trials that are there already."""
    if not (out / JSON).is_file():
        return []
    try:
        saved = read_sealed(out / JSON)
    except UserError:
        if not overwrite:
            raise
        saved = {}
    if saved.get("plan") == _plan(request):
        return saved["trials"]
    require_new(out / JSON, overwrite=overwrite)
    if (out / "trials").exists():
        remove(out / "trials")
    return []


def _distributions(request: TuneConfig) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for r in request.ranges:
        log = r.low > 0 and r.high / r.low >= LOG_FROM
        if r.choices:
            found[r.name] = CategoricalDistribution(r.choices)
        elif r.whole:
            found[r.name] = IntDistribution(int(r.low), int(r.high), log=log)
        else:
            found[r.name] = FloatDistribution(r.low, r.high, log=log)
    return found


def _suggest(request: TuneConfig, done: Sequence[Json]) -> dict[str, Any]:
    """Ask Optuna's tree-structured Parzen estimator for the next settings, given all trials so far."""
    import optuna

    sampler = optuna.samplers.TPESampler(seed=request.seed * 100_003 + len(done))
    study, distributions = optuna.create_study(sampler=sampler), _distributions(request)
    for trial in done:
        study.add_trial(
            optuna.trial.create_trial(
                params=trial["settings"],
                distributions=distributions,
                value=trial["worst"][0],
                constraints={"retain": request.retain_floor - trial["utility"]},
            )
        )
    return study.ask(distributions).params


def _trial(request: TuneConfig, out: Path, number: int, chosen: Mapping[str, Any]) -> Json:
    label = _label(number)
    folder = out / "trials" / label
    asked = configured(request.unlearn, chosen)
    try:
        record = unlearn.unlearn(asked, folder, overwrite=True)
    except UserError as error:
        if number == 0:  # nothing says yet that the search can work at all
            raise
        failed = {"worst": [1.0, 0.0, 1.0], "utility": 0.0, "allowed": False}
        return {"settings": dict(chosen), "method": asked.method, "failed": str(error), **failed}
    result = audit.audit(replace(request.audit, subjects={label: str(folder)}), out)
    [subject] = [s for s in build(result, "").to_json()["subjects"] if s["name"] == label]
    worst, utility = _worst(subject["cells"], request.audit.policy.gates), _utility(subject["cells"], request.audit)
    return {
        "settings": dict(chosen),
        "method": asked.method,
        "worst": worst,
        "utility": utility,
        "allowed": utility >= request.retain_floor,
        "verdict": subject["verdict"],
        "steps": record["fit"]["steps"],
        "seconds": record["fit"]["seconds"],
    }


def _label(number: int) -> str:
    return f"trial-{number:03d}"


def configured(request: unlearn.UnlearnConfig, chosen: Mapping[str, Any]) -> unlearn.UnlearnConfig:
    """Return a request with these settings in the place of its own."""
    types = get_type_hints(Settings)
    training = {name: convert(name, str(value), types[name]) for name, value in chosen.items() if "." not in name}
    spec = request.method
    for name, value in chosen.items():
        part, dot, option = name.partition(".")
        if dot:
            spec = " + ".join(_with_option(bound, part, option, value) for bound in method.parse(spec).parts)
    return replace(request, method=spec, settings=replace(request.settings, **training))


def _with_option(bound: Bound, part: str, option: str, value: Any) -> str:
    return bound.respelled(**{option: value}) if bound.plugin.name == part else bound.spec


def _worst(cells: Sequence[Json], gates: Sequence[str]) -> list[float]:
    """Return value and bounds of the cell of kept knowledge whose upper bound is largest; 1 where one has none."""
    kept = [cell for cell in cells if cell["metric"] in {f"{gate}.kept" for gate in gates}]
    unknown = [1.0, 0.0, 1.0]
    bounds = [[cell.get(name) for name in ("value", "low", "high")] for cell in kept]
    known: list[list[Any]] = [unknown if None in found else found for found in bounds]
    return max(known, key=lambda found: found[2], default=unknown)


def _utility(cells: Sequence[Json], request: audit.AuditConfig) -> float:
    """Return the least retain score in any format, as a share of the original's; 0 where none was measured."""
    retained = {split.name for split in request.benchmark.splits if split.role == "retain"}
    share = f"{request.policy.utility}.share"
    found = [cell for cell in cells if cell["metric"] == share and cell["split"] in retained]
    return min((cell.get("value", 0.0) for cell in found), default=0.0)


def best(trials: Sequence[Json]) -> int | None:
    """Return the number of the allowed trial whose worst case has the least upper bound, None without one."""
    allowed = [i for i, trial in enumerate(trials) if trial["allowed"]]
    return min(allowed, key=lambda i: trials[i]["worst"][2], default=None)


def _keep_best(out: Path, trials: Sequence[Json]) -> None:
    """Keep the best trial's model and drop the weights of all others, which their settings can make again."""
    kept = best(trials)
    for folder in sorted((out / "trials").glob("trial-*")):
        if kept is None or folder.name != _label(kept):
            remove(folder)


def _result(request: TuneConfig, trials: Sequence[Json]) -> Json:
    return {
        "plan": _plan(request),
        "model": request.unlearn.model,
        "benchmark": request.unlearn.benchmark.spec,
        "variants": ",".join(request.audit.variants),
        "retain_floor": request.retain_floor,
        "trials": list(trials),
        "best": best(trials),
    }


def text(result: Json) -> str:
    """Return the trials as a Markdown table, best first, and what came of them in words."""
    trials = result["trials"]
    order = sorted(range(len(trials)), key=lambda i: (not trials[i]["allowed"], trials[i]["worst"][2]))
    names = list(trials[0]["settings"])
    rows = [
        [
            str(i),
            *(significant(v) if isinstance(v := trials[i]["settings"][name], float) else str(v) for name in names),
            f"{number(trials[i]['worst'][0])} (≤ {number(trials[i]['worst'][2])})",
            number(trials[i]["utility"]),
            trials[i].get("verdict", "failed"),
        ]
        for i in order
    ]
    table = markdown_table(["trial", *names, "kept at worst", "utility at least", "verdict"], rows)
    floor = result["retain_floor"]
    if result["best"] is None:
        return f"{table}\n\nNo trial keeps {floor:g} of the retain score in every format."
    return f"{table}\n\nThe best trial that keeps {floor:g} of the retain score is {result['best']}."
