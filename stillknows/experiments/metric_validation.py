"""Which metric deserves to gate a verdict: every metric is tried on models whose knowledge is known.

A faithful metric ranks models that were taught a person's facts above models that never were. Then the person is
unlearned, and models that a metric takes for unlearned are quantized and relearned: a robust metric had not been
fooled, so it does not rise. Models are observed as in an audit; `ranking` turns the observations into numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from stillknows import __version__
from stillknows.auditing.asking import Items, Reader, Reading
from stillknows.auditing.attack_inputs import AttackInputs
from stillknows.auditing.collect import Keys, collected, missing, observe_missing
from stillknows.auditing.forecast import Forecast
from stillknows.auditing.loader import Loader
from stillknows.auditing.observe import OPTIONAL
from stillknows.auditing.policy import Policy
from stillknows.auditing.prepared import Prepared
from stillknows.errors import UserError
from stillknows.experiments.known_models import (
    FEW_ONE_IN,
    IGNORANT,
    KNOWING,
    FactGroups,
    TrainedModel,
    UnlearnedModel,
    fact_groups,
    model_folder,
    models_to_train,
    models_to_unlearn,
    train,
    unlearn_models,
)
from stillknows.formatting import code, markdown_table, number, percent
from stillknows.ledger import Ledger
from stillknows.model import loading
from stillknows.model.encoding import EncodedItem, encode_split
from stillknows.model.ref import ModelRef
from stillknows.progress import log, progress
from stillknows.registry import Bound, Plugin, bind, bind_all, plugins
from stillknows.reporting import ranking
from stillknows.reporting.ranking import RELEARNED, Seen, Trial
from stillknows.scoring import score
from stillknows.specs import Specs
from stillknows.stats import LEVEL
from stillknows.store import locked, require_new, write_json, write_text
from stillknows.types import CONTROL, FULL, Decoding, Example, Observations, Split
from stillknows.variants.variant import Variant, parse_variant

JSON, MARKDOWN = "meta.json", "meta.md"
FORMATS = ("rtn:group=0", "rtn:group=-1", "nf4")  # round to nearest in 4 bits per channel and per tensor, and nf4
RELEARNING_STEPS = 5
RELEARNING = f"relearn:steps={RELEARNING_STEPS}:lr=0.0003:batch_size=18"
MIN_TAUGHT_PROBABILITY = 0.9  # mean answer probability on what a model was taught
MAX_GUESSED_SHARE = 0.1  # of answers that a model without the knowledge gives in full
RETAIN_SAMPLE = 64  # retained examples by which utility is measured


def metrics_to_judge(specs: Specs | None) -> dict[str, Bound]:
    """Return the named metrics, or all of knowledge and membership; UserError for one that measures behaviour."""
    if specs is None:
        suited = [name for name, plugin in plugins("metric", "example").items() if plugin.measures != "behaviour"]
        return {name: bind("metric", name) for name in suited}
    found = bind_all("metric", specs, "example")
    for spec, metric in found.items():
        if metric.plugin.measures == "behaviour":
            raise UserError(
                f"`metrics` {spec} measures behaviour, which models with and without the knowledge may share",
                f"choose from: {', '.join(metrics_to_judge(None))}",
            )
    return found


def validate_metrics(
    out: Path, *, models: int, seed: int, metrics: Specs | None, overwrite: bool, command: str
) -> dict[str, Any]:
    """Train, unlearn, observe, judge the metrics, write meta.json and meta.md into `out`; return what they hold.

    Finished steps are not repeated. Raises UserError for bad input, before anything is trained.
    """
    judged = metrics_to_judge(metrics)
    world = fact_groups(seed)
    trained = models_to_train(world, models, seed)
    unlearned = models_to_unlearn(trained, models, seed)
    with locked(out):
        require_new(out / JSON, overwrite=overwrite)
        loading.quiet()
        train(out, world, trained)
        unlearn_models(out, world, unlearned)
        trial = Trial(
            taught=tuple(model.name for model in trained if model.pool == KNOWING),
            untaught=tuple(model.name for model in trained if model.pool == IGNORANT),
            unlearned={model.name: model.original for model in unlearned},
            formats=FORMATS,
            measured=world.measured,
            seen=_observe(out, world, trained, unlearned, [metric.plugin for metric in judged.values()]),
        )
        result = _result(trial, trained, judged, {model.name: model.method for model in unlearned}, command)
        write_text(out / MARKDOWN, page(result))
        write_json(out / JSON, result)  # last: a folder that holds it is complete
    return result


class _Questions(NamedTuple):
    """A world as tokens, the same for all models.

    splits: of every model's observations. taught: what the knowing models of each kind were taught, their split
        "taught". relearned: the facts that relearning teaches.
    """

    splits: Items
    taught: dict[str, list[EncodedItem]]
    relearned: tuple[Any, ...]


def _questions(world: FactGroups, source: ModelRef) -> _Questions:
    tokenizer, context = source.tokenizer, source.context_length

    def asked(examples: Sequence[Example]) -> list[EncodedItem]:
        split = Split("facts", "forget", tuple(examples))
        return encode_split(split, tokenizer, world.template, context, lowered=True)

    forget = asked(world.asked)
    return _Questions(
        splits={"forget": forget, "holdout": asked(world.holdout), "retain": asked(world.retained[:RETAIN_SAMPLE])},
        taught={"asked": forget, "reworded": asked(world.reworded), "few": forget[::FEW_ONE_IN]},
        relearned=tuple(item.answer for item, apart in zip(forget, world.measured, strict=True) if not apart),
    )


def states() -> dict[str, Variant]:
    """Return what the control and the unlearned models are observed in, by name."""
    return {name: parse_variant(name) for name in (FULL, *FORMATS)} | {RELEARNED: parse_variant(RELEARNING)}


def _observe(
    out: Path,
    world: FactGroups,
    trained: Sequence[TrainedModel],
    unlearned: Sequence[UnlearnedModel],
    judged: Sequence[Plugin],
) -> Seen:
    """Observe every model as it is, and the control and the unlearned ones in every format and relearned as well."""
    control = ModelRef.open(str(model_folder(out, CONTROL)))
    load, keys, ledger = Loader(Reader.of(control), ()), Keys(), Ledger.open(out)
    every, plain = states(), {FULL: parse_variant(FULL)}
    stressed = {CONTROL, *(model.name for model in unlearned)}
    seen: dict[tuple[str, str, str], Observations] = {}
    prepared = _prepared(out, _questions(world, control), trained, unlearned, judged)
    with progress("observing", len(trained) + len(unlearned)) as advance:
        for model in prepared:
            variants = every if model.label in stressed else plain
            observe_missing(load, model, variants, keys, ledger, missing(model, variants, keys, ledger), Forecast([]))
            seen |= collected(model, variants, keys, ledger)
            advance(1, model.label)
    return seen


def _prepared(
    out: Path,
    questions: _Questions,
    trained: Sequence[TrainedModel],
    unlearned: Sequence[UnlearnedModel],
    judged: Sequence[Plugin],
) -> Iterator[Prepared]:
    """Yield all models with what they are asked: the same in every state, so that relearning is judged on all facts."""
    read = {
        "forget": _optional(judged),
        "holdout": _optional([plugin for plugin in judged if plugin.measures == "membership"]),
    }
    taught = {model.name: questions.taught[model.kind] for model in trained if model.pool == KNOWING}
    relearning = parse_variant(RELEARNING)
    for name in [*(model.name for model in trained), *(model.name for model in unlearned)]:
        source = ModelRef.open(str(model_folder(out, name)))
        splits = questions.splits | ({"taught": taught[name]} if name in taught else {})
        yield Prepared(
            name,
            source,
            source.fingerprint,
            decoding=dict.fromkeys(splits, Decoding()),
            fields={split: read.get(split, frozenset()) for split in splits},
            readings={(asking, False): Reading(splits) for asking in ("", relearning.asking)},
            inputs=AttackInputs({(link.identity, "taught"): questions.relearned for link in relearning.links}),
        )


def _optional(judged: Sequence[Plugin]) -> frozenset[str]:
    return OPTIONAL & {name for plugin in judged for name in plugin.fields}


def _result(
    trial: Trial, trained: Sequence[TrainedModel], judged: Mapping[str, Bound], methods: Mapping[str, str], command: str
) -> dict[str, Any]:
    """Return the content of meta.json."""
    gates = Policy().gates
    log(f"judging {len(judged)} metrics")
    ranked = ranking.rank(trial, judged, gates)
    rows = [_trained(trial, model) for model in trained]
    later = [
        {
            "name": model,
            "original": original,
            "method": methods[model],
            "utility": trial.utility(model),
            "probability": {state: trial.probability(model, "forget", state) for state in states()},
        }
        for model, original in trial.unlearned.items()
    ]
    return {
        "stillknows": __version__,
        "command": command,
        "settings": {
            "formats": list(FORMATS),
            "relearning_steps": RELEARNING_STEPS,
            "one_in": FEW_ONE_IN,
            "least_utility": ranking.LEAST_UTILITY,
            "level": LEVEL,
        },
        "gates": list(gates),
        "objections": ranking.objections(ranked, gates),
        "warnings": [f"{row['name']}: {row['problem']}" for row in rows if row["problem"]],
        "metrics": ranked,
        "trained": rows,
        "unlearned": later,
    }


def _trained(trial: Trial, model: TrainedModel) -> dict[str, Any]:
    """Return a trained model's row. "problem" says where it does not know, or knows, what it should."""
    taught = trial.probability(model.name, "taught") if model.pool == KNOWING else None
    recalled = _recalled(trial.seen[model.name, FULL, "forget"])
    problem = ""
    if taught is not None and taught < MIN_TAUGHT_PROBABILITY:
        problem = f"its answer probability on what it was taught is {taught:.2f}, below {MIN_TAUGHT_PROBABILITY:g}"
    if taught is None and recalled > MAX_GUESSED_SHARE:
        problem = f"it gives {recalled:.0%} of the answers that it was never taught, more than {MAX_GUESSED_SHARE:.0%}"
    row = {"name": model.name, "pool": model.pool, "kind": model.kind, "steps": model.steps, "seed": model.seed}
    asked = trial.probability(model.name, "forget")
    return row | {"taught": taught, "asked": asked, "recalled": recalled, "problem": problem}


def _recalled(seen: Observations) -> float:
    """Return the share of answers that are given in full, each of their tokens being the most likely one: 0..1."""
    whole = score(bind("metric", "extraction_strength"), seen) == 1
    return float(whole.mean())


def summary(result: Mapping[str, Any]) -> str:
    """Return the ranking, what it says of the gates, and warnings, as Markdown."""
    gates, against = " and ".join(result["gates"]), "; ".join(result["objections"])
    words = f"The gates of a verdict, {gates}, " + (f"are not supported: {against}." if against else "are supported.")
    return "\n\n".join([ranking.table(result["metrics"]), words, *(f"Warning: {text}." for text in result["warnings"])])


def page(result: Mapping[str, Any]) -> str:
    """Return meta.md."""
    trained = [
        [m["name"], m["pool"], m["kind"], str(m["steps"])]
        + [number(m[share], "–") for share in ("taught", "asked", "recalled")]
        for m in result["trained"]
    ]
    unlearned = [
        [m["name"], m["original"], f"`{m['method']}`", *map(number, [m["utility"], *m["probability"].values()])]
        for m in result["unlearned"]
    ]
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"percent": percent, "code": code}
    template = environment.from_string(
        files("stillknows.experiments").joinpath("metric_validation.md.j2").read_text(encoding="utf-8")
    )
    states = list(result["unlearned"][0]["probability"])
    return template.render(
        result=result,
        settings=result["settings"],
        ranking=summary(result),
        trained=markdown_table(["model", "pool", "taught", "steps", "p, taught", "p, asked", "recalled"], trained),
        unlearned=markdown_table(["model", "from", "method", "utility", *states], unlearned),
    )
