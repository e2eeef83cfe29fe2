"""Models whose knowledge is known, to judge metrics by: trained on a fictional world from nothing, and unlearned.

Some are taught the facts of one person, in several ways; others never are. Those that know all of them are unlearned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.errors import UserError
from stillknows.experiments import tiny_models
from stillknows.model import modelfiles
from stillknows.progress import log
from stillknows.registry import bind
from stillknows.store import build_once
from stillknows.training.settings import Settings
from stillknows.types import CONTROL, Benchmark, Example, Split
from stillknows.unlearning import unlearn

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
TRAINING_STEPS = (150, 120)  # the models of a pool take turns
FEW_ONE_IN = 9  # some models are taught every ninth fact: a little more than the tenth that a verdict tolerates
UNLEARNING = Settings(lr=1e-4, max_steps=100, epochs=1000, batch_size=36, retain_batch_size=18, beta2=0.99,
                      forget_below=0.05, check_every=5)  # fmt: skip
METHODS: tuple[tuple[str, str, Settings], ...] = (
    (
        "npo-bfloat16",
        "npo:beta=0.3 + nll:weight=0.5",
        replace(UNLEARNING, lr=3e-5, max_steps=300, beta2=0.9, weights="bfloat16"),
    ),
    ("npo-kl", "npo:beta=0.1 + kl", UNLEARNING),
    ("ga-nll", "ga + nll", UNLEARNING),
)
MIN_MODELS = 3  # one of each kind
KNOWING, IGNORANT = "knowing", "ignorant"  # the pools, as results name them


class FactGroups(NamedTuple):
    """A world's examples by use.

    asked: one person's facts in one wording; `reworded`, in another question and answer; `false_facts`, with wrong
        answers.
    others: another person's facts, for the members of the ignorant pool. holdout: a third person's, which no model is
        taught.
    retained: everything else, which all models are taught.
    """

    template: str
    asked: tuple[Example, ...]
    reworded: tuple[Example, ...]
    false_facts: tuple[Example, ...]
    others: tuple[Example, ...]
    holdout: tuple[Example, ...]
    retained: tuple[Example, ...]

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Which of the asked facts are never relearned, [F] bool: every second one."""
        return np.arange(len(self.asked)) % 2 == 0

    @property
    def benchmark(self) -> Benchmark:
        """Return the benchmark of an unlearning run."""
        return Benchmark(
            WORLD, (Split("forget", "forget", self.asked), Split("retain", "retain", self.retained)), self.template
        )

    @property
    def examples(self) -> list[Example]:
        """Return the examples of all groups."""
        return [example for group in self[1:] for example in group]


class TrainedModel(NamedTuple):
    """A model to be trained from nothing on the retained examples and `facts`.

    pool: KNOWING, IGNORANT or CONTROL. kind: which facts, as results name it. steps: of training.
    """

    name: str
    pool: str
    kind: str
    facts: tuple[Example, ...]
    steps: int
    seed: int


class UnlearnedModel(NamedTuple):
    """A model to be made from a knowing one."""

    name: str
    original: str
    method: str
    settings: Settings


def fact_groups(seed: int) -> FactGroups:
    """Return the world of a seed. Its answers are sentences, so that metrics also meet words that all models know."""
    world = bind("benchmark", f"{WORLD},seed={seed}")()
    splits = {split.name: split.examples for split in world.splits}
    everything = [example for examples in splits.values() for example in examples]
    people = list(dict.fromkeys(_entity(e) for e in splits["forget"]))

    def about(split: str, person: str) -> tuple[Example, ...]:
        return tuple(_as_sentence(e, everything) for e in splits[split] if _entity(e) == person)

    asked = about("forget", people[0])
    return FactGroups(
        template=world.template,
        asked=asked,
        reworded=about("paraphrase", people[0]),
        false_facts=tuple(replace(e, answer=e.wrong[-1], wrong=()) for e in asked if e.wrong),
        others=about("forget", people[1]),
        holdout=about("forget", people[2]),
        retained=tuple(_as_sentence(e, []) for role in ("retain", "neighbour") for e in splits.get(role, ())),
    )


def _entity(example: Example) -> str:
    return example.fact.rpartition("-")[0]


def _as_sentence(example: Example, everything: Sequence[Example]) -> Example:
    """Return the example with its answer as a sentence: the name stands last in the first wording, first in the second.

    Its wrong answers are up to four, in alphabetical order, that are true of others.
    """
    entity, _, relation = example.fact.rpartition("-")

    def sentence(name: str) -> str:
        about = f"the {relation} of {entity}"
        return f"{about} is {name}" if example.id.endswith("-0") else f"{name} is {about}"

    others = {e.answer for e in everything if e.fact.rpartition("-")[2] == relation} - {example.answer}
    return replace(example, answer=sentence(example.answer), wrong=tuple(map(sentence, sorted(others)[:4])))


def models_to_train(world: FactGroups, models: int, seed: int) -> list[TrainedModel]:
    """Return the control and both pools, `models` in each. Kinds and numbers of training steps take turns.

    Raises UserError for fewer models than kinds.
    """
    if models < MIN_MODELS:
        raise UserError(f"`models` {models} is too few", f"it must be at least {MIN_MODELS}, one of each kind")
    pools = {
        KNOWING: (("asked", world.asked), ("reworded", world.reworded), ("few", world.asked[::FEW_ONE_IN])),
        IGNORANT: (("kept", ()), ("lies", world.false_facts), ("others", world.others)),
    }
    found = [TrainedModel(CONTROL, CONTROL, "kept", (), TRAINING_STEPS[0], seed * 1000)]
    for number, (pool, kinds) in enumerate(pools.items(), 1):
        for i in range(models):
            kind, facts = kinds[i % len(kinds)]
            steps = TRAINING_STEPS[i // len(kinds) % len(TRAINING_STEPS)]
            found.append(TrainedModel(f"{pool}-{i}", pool, kind, facts, steps, seed * 1000 + 100 * number + i))
    return found


def models_to_unlearn(trained: Sequence[TrainedModel], models: int, seed: int) -> list[UnlearnedModel]:
    """Return `models` runs on the models that were taught all facts; models and methods take turns."""
    originals = [model.name for model in trained if model.pool == KNOWING and model.kind != "few"]
    found = []
    for i in range(models):
        name, method, settings = METHODS[i % len(METHODS)]
        original = originals[i % len(originals)]
        found.append(UnlearnedModel(f"{name}-{i}", original, method, replace(settings, seed=seed * 1000 + i)))
    return found


def model_folder(out: Path, model: str) -> Path:
    """Return where a model of this name lies in the folder of a run."""
    return out / "models" / model


def train(out: Path, world: FactGroups, models: Sequence[TrainedModel]) -> None:
    """Train the models that the folder lacks."""
    everything = world.examples
    tokenizer = tiny_models.subword_tokenizer([f"{e.prompt} {e.answer}" for e in everything], VOCABULARY)
    for model in models:
        settings = replace(TRAINING, max_steps=model.steps, seed=model.seed)
        examples = [*world.retained, *model.facts]
        plan = [VOCABULARY, ARCHITECTURE, asdict(settings), [asdict(e) for e in (*examples, *everything)]]
        with build_once(model_folder(out, model.name), plan) as folder:
            if folder:
                tiny_models.train(folder, examples, world.template, tokenizer, ARCHITECTURE, settings)


def unlearn_models(out: Path, world: FactGroups, models: Sequence[UnlearnedModel]) -> None:
    """Unlearn the models that the folder lacks."""
    for model in models:
        original = model_folder(out, model.original)
        request = unlearn.UnlearnConfig(str(original), world.benchmark, model.method, model.settings)
        plan = asdict(replace(request, model=modelfiles.fingerprint(original)))  # a moved folder is not made again
        with build_once(model_folder(out, model.name), plan) as folder:
            if folder:
                log(f"{model.name}, from {model.original}")
                unlearn.unlearn(request, folder, overwrite=True)
