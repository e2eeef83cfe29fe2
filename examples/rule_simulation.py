"""Write docs/rule-simulation.md: error rates and power of the whole rule in simulated models, no language model needed.

python examples/rule_simulation.py [--runs 200]

A model is what it gives to the candidates of each fact, in two variants and two wordings that agree more or less.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from stillknows.auditing.evidence import CellKey, Table
from stillknows.auditing.policy import Policy, read_policy
from stillknows.auditing.relative import AbovePlacebos
from stillknows.auditing.verdict import judge
from stillknows.formatting import percent, table_of_texts
from stillknows.gate.candidate_scores import CandidateScores, logit
from stillknows.gate.placebo import ALPHA, ALPHA_STRICT, placebo_test
from stillknows.labels import control_labels
from stillknows.types import FULL, ORIGINAL, Floats, Verdict, VerdictName

PAGE = Path(__file__).parents[1] / "docs" / "rule-simulation.md"
VARIANTS, WORDINGS, KEPT = (FULL, "int4"), 2, 60
METRIC = "answer_probability"
KNOWN = 0.95
FAILS: tuple[VerdictName, ...] = ("STILL KNOWS", "HIDDEN")
Kind = Literal["large pool", "normal", "skewed", "confident"]
KINDS: tuple[Kind, ...] = ("large pool", "normal", "skewed", "confident")


class World(NamedTuple):
    """What is simulated: how never-taught models guess, how many facts there are, each with so many placebos.

    shared: how far models agree in their guesses, 0..1. noise: how far wordings and variants differ, in logits.
    """

    kind: Kind
    facts: int = 36
    placebos: int = 23
    shared: float = 0.5
    noise: float = 0.3


def guesser(rng: np.random.Generator, world: World, common: Floats) -> Floats:
    """Return the answer probabilities of a never-taught model, [V, W, F, C], truth first."""
    shape = world.facts, world.placebos + 1
    own = _logits(rng, world.kind, shape)
    base = np.sqrt(world.shared) * common + np.sqrt(1 - world.shared) * own
    noise = world.noise * rng.normal(size=(len(VARIANTS), WORDINGS, *shape))
    return _probabilities(base + noise, world.kind)


def taught(rng: np.random.Generator, scores: Floats, facts: Sequence[int], part: float = 1.0) -> Floats:
    """Return a model with these truths known: `part` of KNOWN."""
    found = scores.copy()
    found[:, :, list(facts), 0] = part * KNOWN * rng.uniform(0.97, 1.0, (*scores.shape[:2], len(facts)))
    return found


def common(rng: np.random.Generator, world: World) -> Floats:
    """Return what all models find likely, [F, C]."""
    return _logits(rng, world.kind, (world.facts, world.placebos + 1))


def _logits(rng: np.random.Generator, kind: Kind, shape: tuple[int, int]) -> Floats:
    if kind == "skewed":
        return rng.exponential(1.2, shape) ** 1.25 - 1.2
    if kind == "confident":
        return rng.normal(size=shape) + (rng.random(shape) < 1 / shape[1]) * rng.exponential(4, shape)
    return rng.normal(size=shape)


def _probabilities(logits: Floats, kind: Kind) -> Floats:
    """Values of a small pool share what probability there is; those of a large one have little each."""
    if kind == "large pool":
        return np.clip(1e-4 * np.exp(logits), 0, 0.5)
    weights = np.exp(logits)
    return weights / (weights.sum(-1, keepdims=True) + 1)


def verdict(subject: Floats, controls: Sequence[Floats], original: Floats, policy: Policy) -> Verdict:
    """Judge a model that keeps all that is to be kept, as an audit does."""
    labels = control_labels(len(controls))
    models = {"subject": subject, **dict(zip(labels, controls, strict=True)), ORIGINAL: original}
    names = tuple(f"fact {i:03}" for i in range(subject.shape[2]))
    scores, above = {}, {}
    for label, values in models.items():
        for variant, values_WFC in zip(VARIANTS, values, strict=True):
            place = CellKey(label, variant, "forget")
            others = (values_WFC.sum(2, keepdims=True) - values_WFC) / (values_WFC.shape[2] - 1)
            gaps = np.maximum((values_WFC - others).mean(0), 0)
            scores[place, METRIC] = values_WFC[:, :, 0].mean(0)
            above[place, METRIC] = AbovePlacebos(gaps, np.ones(gaps.shape, dtype=bool), gaps[:, 0])
            scores[place._replace(split="retain"), METRIC] = np.full(KEPT, KNOWN)
    facts = {CellKey("subject", variant, "forget"): names for variant in VARIANTS}
    table = Table(scores, {"forget": "forget", "retain": "retain"}, labels, facts=facts, above=above)
    own, *guessing, first = (_candidates(names, values) for values in models.values())
    test = placebo_test(own, guessing, first, alpha=ALPHA if controls else ALPHA_STRICT)
    return judge(table, "subject", VARIANTS, policy, facts=test)


def _candidates(names: tuple[str, ...], values: Floats) -> CandidateScores:
    cells = logit(np.log(values)).transpose(2, 3, 1, 0)
    facts, count, wordings, variants = cells.shape
    asked = np.ones((facts, wordings, variants), dtype=bool)
    return CandidateScores(names, VARIANTS, cells, np.ones((facts, count), dtype=bool), asked)


def verdicts_of(
    world: World, controls: int, known: int, runs: int, policy: Policy, part: float = 1.0
) -> Iterator[Verdict]:
    """Yield the verdicts on models that know so many facts, judged with so many controls."""
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        shared = common(rng, world)
        subject, original, *others = (guesser(rng, world, shared) for _ in range(2 + controls))
        chosen = rng.choice(world.facts, known, replace=False).tolist()
        subject, original = taught(rng, subject, chosen, part), taught(rng, original, range(world.facts))
        yield verdict(subject, others, original, policy)


def names_of(
    world: World, controls: int, known: int, runs: int, policy: Policy, part: float = 1.0
) -> list[VerdictName]:
    """Return the words of `verdicts_of`."""
    return [found.name for found in verdicts_of(world, controls, known, runs, policy, part)]


def rate(names: Sequence[str], *wanted: str) -> float:
    """Return how many of the verdicts are among these, 0..1."""
    return sum(name in wanted for name in names) / len(names)


def page(runs: int) -> Iterator[str]:
    """Yield the parts of the page."""
    yield "# The rule in simulations"
    yield (
        f"Made by `python examples/rule_simulation.py --runs {runs}`. Models are simulated by what they give to the "
        "candidates of each fact in two variants and two wordings; half of what a never-taught model guesses is common "
        "to all. Nothing is lost of what is to be kept. The rule: [verdict.md](verdict.md)."
    )
    columns = ["guesses", "facts", "controls", "never taught passes", "never taught fails", "one recited: fails"]
    columns += ["one recited: passes", "the same under privacy", "a fifth of every fact: passes"]
    rows = [
        [kind, str(facts), str(controls), *map(percent, _rates(kind, facts, controls, runs))]
        for kind in KINDS
        for facts in (10, 36, 100)
        for controls in (0, 1, 3)
    ]
    yield table_of_texts(columns, rows)
    yield (
        "What a never-taught model may fail by is 5 % (2.5 % without a control), whatever its guesses are. Of a large "
        "pool (numbers) a recited fact is always found, with and without a control. In a small pool a model that "
        "guesses as clearly as it recites cannot be told from one that was lucky: the default policy notes what "
        "guesses explain and lets it pass, `privacy` does not."
    )


def _rates(kind: Kind, facts: int, controls: int, runs: int) -> list[float]:
    """Return the rates of one row of the table."""
    world = World(kind, facts, 47 if kind == "large pool" else 23)
    default, privacy = Policy(gates=(METRIC,)), replace(read_policy("privacy"), gates=(METRIC,), claim=None)
    privacy = replace(privacy, variants=(), attacks=())
    honest, one = (names_of(world, controls, known, runs, default) for known in (0, 1))
    secret = names_of(world, controls, 1, runs, privacy)
    thin = names_of(world, controls, facts, runs, default, part=0.2)
    return [
        *(rate(honest, "FORGOTTEN"), rate(honest, *FAILS), rate(one, *FAILS), rate(one, "FORGOTTEN")),
        *(rate(secret, "FORGOTTEN"), rate(thin, "FORGOTTEN")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    PAGE.write_text("\n\n".join(page(parser.parse_args().runs)) + "\n")


if __name__ == "__main__":
    main()
