"""Which metric deserves to gate a verdict: every metric is tried on models whose knowledge is known.

Small models are trained from nothing on a fictional world. Some are taught the facts of one person, in diverse ways;
others never are. A faithful metric ranks the first above the second. Then the person is unlearned, and models that a
metric takes for unlearned are quantized and relearned: a robust metric had not been fooled, so it does not rise.
`ranking` makes numbers of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from stillknows import __version__
from stillknows.auditing.loader import OBSERVATIONS_VERSION
from stillknows.auditing.observe import OPTIONAL, observe
from stillknows.auditing.verdict import Policy
from stillknows.errors import UserError
from stillknows.experiments import tiny_models
from stillknows.formatting import code, markdown_table, number, percent
from stillknows.model import checkpoints
from stillknows.model.encoding import Asked, Encoded, encode_split
from stillknows.observations import load_observations, save_observations
from stillknows.progress import log, progress
from stillknows.registry import Bound, Plugin, bind, bind_all, plugins
from stillknows.reporting import ranking
from stillknows.reporting.ranking import RELEARNED, Seen, Trial
from stillknows.scoring import score
from stillknows.stats import LEVEL
from stillknows.store import build_once, digest, locked, require_new, slug, write_json, write_text
from stillknows.training.finetune import finetune
from stillknows.training.loop import Settings
from stillknows.types import CONTROL, FULL, Benchmark, Example, Observations, Split
from stillknows.unlearning import unlearn
from stillknows.variants import compress

JSON, MARKDOWN = "meta.json", "meta.md"
WORLD = "world:people=15,forget=3,facts=14,values=16"
VOCABULARY = 600  # small, so that most names take two or three tokens and can be known in part
CONTEXT = 48
ARCHITECTURE = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
TRAINING = Settings(lr=3e-3, max_steps=120, epochs=1000, batch_size=48, warmup=20, schedule="linear", beta2=0.99)
LENGTHS = (150, 120)  # training steps; the models of a pool take turns
FEW = 9  # some models are taught every ninth fact: a little more than the tenth that a verdict tolerates
DEEP = Settings(lr=1e-4, max_steps=100, epochs=1000, batch_size=36, retain_batch_size=18, beta2=0.99,
                forget_below=0.05, check_every=5)  # fmt: skip
METHODS: tuple[tuple[str, str, Settings], ...] = (
    (
        "npo-bfloat16",
        "npo:beta=0.3 + nll:weight=0.5",
        replace(DEEP, lr=3e-5, max_steps=300, beta2=0.9, weights="bfloat16"),
    ),
    ("npo-kl", "npo:beta=0.1 + kl", DEEP),
    ("ga-nll", "ga + nll", DEEP),
)
RELEARNING = Settings(lr=3e-4, max_steps=5, epochs=1000, batch_size=18)
FORMATS = ("rtn:group=0", "rtn:group=-1", "nf4")  # round to nearest in 4 bits per channel and per tensor, and nf4
STATES = (FULL, *FORMATS, RELEARNED)
LEAST_MODELS = 3  # one of each kind
KNOWN = 0.9  # least mean answer probability on what a model was taught
GUESSED = 0.1  # largest share of answers that a model without the knowledge may give in full
KEPT_SAMPLE = 64  # retained examples by which utility is measured


class Facts(NamedTuple):
    """The world by use: one person's facts `asked` in one wording, `reworded` in another question and answer, and asked
    with wrong answers (`lies`); another person's for the members of the other pool (`others`) and a third person's that
    no model is taught (`holdout`); everything else is `kept` and taught to all."""

    template: str
    asked: tuple[Example, ...]
    reworded: tuple[Example, ...]
    lies: tuple[Example, ...]
    others: tuple[Example, ...]
    holdout: tuple[Example, ...]
    kept: tuple[Example, ...]

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Which of the asked facts are never relearned, [F] bool: every second one."""
        return np.arange(len(self.asked)) % 2 == 0

    @property
    def benchmark(self) -> Benchmark:
        """What an unlearning run is given."""
        return Benchmark(
            WORLD, (Split("forget", "forget", self.asked), Split("retain", "retain", self.kept)), self.template
        )


class Pupil(NamedTuple):
    """A model to be trained from nothing: what it is taught besides the kept facts, for how long, with which seed.

    `pool` is "knowing", "ignorant" or "control"."""

    name: str
    pool: str
    kind: str
    lessons: tuple[Example, ...]
    steps: int
    seed: int


class UnlearnedModel(NamedTuple):
    """A model to be made from a knowing one."""

    name: str
    original: str
    method: str
    settings: Settings


def facts(seed: int) -> Facts:
    """Return the world of a seed, its answers made into sentences so that a metric also meets words that all know."""
    world = bind("benchmark", f"{WORLD},seed={seed}")()
    splits = {split.name: split.examples for split in world.splits}
    everything = [example for examples in splits.values() for example in examples]
    people = list(dict.fromkeys(_entity(e) for e in splits["forget"]))

    def about(split: str, person: str) -> tuple[Example, ...]:
        return tuple(_stated(e, everything) for e in splits[split] if _entity(e) == person)

    asked = about("forget", people[0])
    return Facts(
        template=world.template,
        asked=asked,
        reworded=about("paraphrase", people[0]),
        lies=tuple(replace(e, answer=e.wrong[-1], wrong=()) for e in asked if e.wrong),
        others=about("forget", people[1]),
        holdout=about("forget", people[2]),
        kept=tuple(_stated(e, []) for role in ("retain", "neighbour") for e in splits.get(role, ())),
    )


def _entity(example: Example) -> str:
    return example.fact.rpartition("-")[0]


def _stated(example: Example, everything: Sequence[Example]) -> Example:
    """Return the example with its answer as a sentence, the name last in the first wording and first in the second.

    Its wrong answers name what is true of others: four of them, in the order of the alphabet.
    """
    entity, _, relation = example.fact.rpartition("-")

    def sentence(name: str) -> str:
        about = f"the {relation} of {entity}"
        return f"{about} is {name}" if example.id.endswith("-0") else f"{name} is {about}"

    others = {e.answer for e in everything if e.fact.rpartition("-")[2] == relation} - {example.answer}
    return replace(example, answer=sentence(example.answer), wrong=tuple(map(sentence, sorted(others)[:4])))


def pupils(world: Facts, models: int, seed: int) -> list[Pupil]:
    """Return the control and both pools, `models` in each: their kinds and lengths of training take turns.

    Raises UserError for fewer models than kinds.
    """
    if models < LEAST_MODELS:
        raise UserError(f"--models {models} is too few", f"it must be at least {LEAST_MODELS}, one of each kind")
    kinds = {
        "knowing": (("asked", world.asked), ("reworded", world.reworded), ("few", world.asked[::FEW])),
        "ignorant": (("kept", ()), ("lies", world.lies), ("others", world.others)),
    }
    found = [Pupil(CONTROL, CONTROL, "kept", (), LENGTHS[0], seed * 1000)]
    for pool, (name, lessons) in enumerate(kinds.items(), 1):
        for i in range(models):
            kind, taught = lessons[i % len(lessons)]
            steps = LENGTHS[i // len(lessons) % len(LENGTHS)]
            found.append(Pupil(f"{name}-{i}", name, kind, taught, steps, seed * 1000 + 100 * pool + i))
    return found


def unlearning(taught: Sequence[Pupil], models: int, seed: int) -> list[UnlearnedModel]:
    """Return what to unlearn from the knowing models that were taught all facts; models and methods take turns."""
    originals = [pupil for pupil in taught if pupil.pool == "knowing" and pupil.kind != "few"]
    found = []
    for i in range(models):
        name, method, settings = METHODS[i % len(METHODS)]
        original = originals[i % len(originals)].name
        found.append(UnlearnedModel(f"{name}-{i}", original, method, replace(settings, seed=seed * 1000 + i)))
    return found


def metrics_to_judge(specs: str | None) -> dict[str, Bound]:
    """Return the named metrics, or all of knowledge and membership; UserError for one that measures behaviour."""
    if specs is None:
        suited = [name for name, plugin in plugins("metric").items() if plugin.measures != "behaviour"]
        return {name: bind("metric", name) for name in suited}
    found = bind_all("metric", specs)
    for spec, metric in found.items():
        if metric.plugin.measures == "behaviour":
            raise UserError(
                f"--metrics {spec} measures behaviour, which models with and without the knowledge may share",
                f"choose from: {', '.join(metrics_to_judge(None))}",
            )
    return found


def validate_metrics(
    out: Path, *, models: int, seed: int, metrics: str | None, overwrite: bool, command: str
) -> dict[str, Any]:
    """Train, unlearn, observe, judge the metrics, write meta.json and meta.md into `out`; return what they hold.

    Finished steps are not repeated. Raises UserError for bad input, before anything is trained.
    """
    judged = metrics_to_judge(metrics)
    world = facts(seed)
    taught = pupils(world, models, seed)
    later = unlearning(taught, models, seed)
    with locked(out):
        require_new(out / JSON, overwrite=overwrite)
        checkpoints.quiet()
        _train(out, world, taught)
        _unlearn(out, world, later)
        seen = _observe(out, world, taught, later, [metric.plugin for metric in judged.values()])
        trial = Trial(
            knowing=tuple(pupil.name for pupil in taught if pupil.pool == "knowing"),
            ignorant=tuple(pupil.name for pupil in taught if pupil.pool == "ignorant"),
            unlearned={model.name: model.original for model in later},
            formats=FORMATS,
            measured=world.measured,
            seen=seen,
        )
        result = _result(trial, taught, judged, {model.name: model.method for model in later}, command)
        write_text(out / MARKDOWN, page(result))
        write_json(out / JSON, result)  # last: a folder that holds it is complete
    return result


def _folder(out: Path, model: str) -> Path:
    return out / "models" / model


def _train(out: Path, world: Facts, taught: Sequence[Pupil]) -> None:
    everything = [example for group in world[1:] for example in group]
    tokenizer = tiny_models.subword_tokenizer([f"{e.prompt} {e.answer}" for e in everything], VOCABULARY)
    for pupil in taught:
        settings = replace(TRAINING, max_steps=pupil.steps, seed=pupil.seed)
        examples = [*world.kept, *pupil.lessons]
        plan = [VOCABULARY, ARCHITECTURE, asdict(settings), [asdict(e) for e in (*examples, *everything)]]
        with build_once(_folder(out, pupil.name), plan) as folder:
            if folder:
                tiny_models.train(folder, examples, world.template, tokenizer, ARCHITECTURE, settings)


def _unlearn(out: Path, world: Facts, later: Sequence[UnlearnedModel]) -> None:
    for model in later:
        original = _folder(out, model.original)
        request = unlearn.UnlearnConfig(str(original), world.benchmark, model.method, model.settings)
        plan = asdict(replace(request, model=checkpoints.fingerprint(original)))  # a moved folder is not made again
        with build_once(_folder(out, model.name), plan) as folder:
            if folder:
                log(f"{model.name}, from {model.original}")
                unlearn.unlearn(request, folder, overwrite=True)


class SplitQuestions(NamedTuple):
    """The world as tokens, which all models share: what each split of their observations asks, what the knowing models
    of each kind were `taught`, and what is relearned."""

    splits: dict[str, list[Asked]]
    taught: dict[str, list[Asked]]
    relearned: list[Encoded]


def _questions(world: Facts, folder: Path) -> SplitQuestions:
    source = checkpoints.locate(str(folder))
    tokenizer, context = checkpoints.load_tokenizer(source), checkpoints.context_length(source)

    def asked(examples: Sequence[Example]) -> list[Asked]:
        split = Split("facts", "forget", tuple(examples))
        return encode_split(split, tokenizer, world.template, context, lowered=True)

    forget = asked(world.asked)
    return SplitQuestions(
        splits={"forget": forget, "holdout": asked(world.holdout), "retain": asked(world.kept[:KEPT_SAMPLE])},
        taught={"asked": forget, "reworded": asked(world.reworded), "few": forget[::FEW]},
        relearned=[item.answer for item, apart in zip(forget, world.measured, strict=True) if not apart],
    )


def _observe(
    out: Path, world: Facts, taught: Sequence[Pupil], later: Sequence[UnlearnedModel], judged: Sequence[Plugin]
) -> Seen:
    """Observe every model as it is, and the control and the unlearned ones in every format and relearned as well."""
    fields = {
        "forget": _optional(judged),
        "holdout": _optional([plugin for plugin in judged if plugin.measures == "membership"]),
    }
    questions = _questions(world, _folder(out, CONTROL))
    lessons = {pupil.name: questions.taught[pupil.kind] for pupil in taught if pupil.pool == "knowing"}
    stressed = {CONTROL, *(model.name for model in later)}
    seen: dict[tuple[str, str, str], Observations] = {}
    names = [*(pupil.name for pupil in taught), *(model.name for model in later)]
    with progress("observing", len(names)) as advance:
        for name in names:
            splits = questions.splits | ({"taught": lessons[name]} if name in lessons else {})
            model = _Model(out, name, splits, questions.relearned, fields)
            for state in STATES if name in stressed else (FULL,):
                seen |= {(name, state, split): found for split, found in model.observed(state).items()}
            advance(1, name)
    return seen


def _optional(judged: Sequence[Plugin]) -> frozenset[str]:
    return OPTIONAL & {name for plugin in judged for name in plugin.fields}


class _Model:
    """A model on disk that is observed in its states; what the folder holds already is not observed again."""

    def __init__(
        self,
        out: Path,
        name: str,
        splits: Mapping[str, list[Asked]],
        relearned: list[Encoded],
        fields: Mapping[str, Collection[str]],
    ) -> None:
        self.folder, self.splits, self.relearned, self.fields = out / "observations" / name, splits, relearned, fields
        self.source = checkpoints.locate(str(_folder(out, name)))
        self.keys = {
            split: digest(
                OBSERVATIONS_VERSION, self.source.fingerprint, sorted(fields.get(split, ())), [asdict(i) for i in items]
            )
            for split, items in splits.items()
        }

    def observed(self, state: str) -> dict[str, Observations]:
        """Return the observations of every split in a state."""
        chain = compress.parse_variant(state) if state in FORMATS else ()
        how = [asdict(RELEARNING), [item.ids for item in self.relearned]] if state == RELEARNED else []
        keys = {split: digest(known, [link.identity for link in chain], how) for split, known in self.keys.items()}
        paths = {split: self.folder / slug(state) / f"{split}.npz" for split in self.splits}
        found = {split: load_observations(path, keys[split]) for split, path in paths.items()}
        saved = {split: seen for split, seen in found.items() if seen is not None}
        if saved.keys() == self.splits.keys():
            return saved
        subject = checkpoints.load(self.source)
        if state == RELEARNED:
            finetune(subject.model, self.relearned, RELEARNING, label="relearning")
        with compress.compressed(subject.model, chain):
            for split, items in self.splits.items():
                saved[split] = observe(subject.model, subject.tokenizer, items, fields=self.fields.get(split, ()))
                save_observations(paths[split], keys[split], saved[split])
        return saved


def _result(
    trial: Trial, taught: Sequence[Pupil], judged: Mapping[str, Bound], methods: Mapping[str, str], command: str
) -> dict[str, Any]:
    """Return the content of meta.json."""
    gates = Policy().gates
    log(f"judging {len(judged)} metrics")
    rows = ranking.rank(trial, judged, gates)
    trained = [_trained(trial, pupil) for pupil in taught]
    later = [
        {
            "name": model,
            "original": original,
            "method": methods[model],
            "utility": trial.utility(model),
            "probability": {state: trial.probability(model, "forget", state) for state in STATES},
        }
        for model, original in trial.unlearned.items()
    ]
    return {
        "stillknows": __version__,
        "command": command,
        "settings": {
            "formats": list(FORMATS),
            "relearning_steps": RELEARNING.max_steps,
            "one_in": FEW,
            "least_utility": ranking.LEAST_UTILITY,
            "level": LEVEL,
        },
        "gates": list(gates),
        "objections": ranking.objections(rows, gates),
        "warnings": [f"{row['name']}: {row['problem']}" for row in trained if row["problem"]],
        "metrics": rows,
        "trained": trained,
        "unlearned": later,
    }


def _trained(trial: Trial, pupil: Pupil) -> dict[str, Any]:
    """Return what is known of a trained model, with the problem where it does not know, or knows, what it should."""
    taught = trial.probability(pupil.name, "taught") if pupil.pool == "knowing" else None
    recalled = _recalled(trial.seen[pupil.name, FULL, "forget"])
    problem = ""
    if taught is not None and taught < KNOWN:
        problem = f"its answer probability on what it was taught is {taught:.2f}, below {KNOWN:g}"
    if taught is None and recalled > GUESSED:
        problem = f"it gives {recalled:.0%} of the answers that it was never taught, more than {GUESSED:.0%}"
    row = {"name": pupil.name, "pool": pupil.pool, "kind": pupil.kind, "steps": pupil.steps, "seed": pupil.seed}
    asked = trial.probability(pupil.name, "forget")
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
