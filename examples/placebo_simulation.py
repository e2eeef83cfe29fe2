"""Write docs/placebo.md: level and power of the placebo test, and of other rules, in simulated models.

python examples/placebo_simulation.py [--runs 400]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy.stats import genpareto

from stillknows.formatting import percent, table_of_texts
from stillknows.gate.placebo import step_down
from stillknows.stats import holm
from stillknows.types import Floats

PAGE = Path(__file__).parents[1] / "docs" / "placebo.md"
ALPHA = 0.05
KNOWN = 15.0  # by how much a known truth stands above its fact's median, on the logit scale
Rule = Callable[[Floats, list[Floats]], Floats]  # (subject, controls), [F, C] each -> p-values adjusted over facts, [F]


def guesses(rng: np.random.Generator, facts: int, candidates: int, kind: str, shared: Floats) -> Floats:
    """Return what a never-taught model gives to the candidates of each fact, [F, C]; all models share `shared`."""
    shape = facts, candidates
    own = {
        "normal": lambda: 2 * rng.normal(size=shape),
        "skewed": lambda: rng.exponential(1.2, shape) ** 1.25,
        "confident": lambda: rng.normal(size=shape) + (rng.random(shape) < 1 / candidates) * rng.exponential(4, shape),
        "uneven": lambda: rng.normal(size=shape) * rng.lognormal(0.3, 0.6, (facts, 1)),
    }[kind]()
    values = own + shared
    return values - np.median(values, axis=1, keepdims=True)


def placebo(subject: Floats, controls: list[Floats]) -> Floats:
    """The test of stillknows."""
    return _stepped(subject - np.maximum(np.mean(controls, axis=0), 0) if controls else subject)


def subtracted(subject: Floats, controls: list[Floats]) -> Floats:
    """Controls subtracted whole, so that a candidate gains by what they dislike."""
    return _stepped(subject - np.mean(controls, axis=0) if controls else subject)


def own_spread(subject: Floats, controls: list[Floats]) -> Floats:
    """Each fact divided by the median size of its own candidates."""
    d = subject - np.maximum(np.mean(controls, axis=0), 0) if controls else subject
    return _stepped(d / np.median(np.abs(d), axis=1, keepdims=True))


def pooled(subject: Floats, controls: list[Floats]) -> Floats:
    """Rank among the placebos of all facts, then Holm."""
    d = subject - np.maximum(np.mean(controls, axis=0), 0) if controls else subject
    pool = np.sort(d[:, 1:].ravel())
    p = (1 + len(pool) - np.searchsorted(pool, d[:, 0])) / (1 + len(pool))
    return np.array(holm(p.tolist()))


def pareto(subject: Floats, controls: list[Floats]) -> Floats:
    """A generalised Pareto distribution fitted to the largest tenth of all placebos, then Holm."""
    d = subject - np.maximum(np.mean(controls, axis=0), 0) if controls else subject
    pool = d[:, 1:].ravel()
    threshold = np.quantile(pool, 0.9)
    shape, _, scale = genpareto.fit(pool[pool > threshold] - threshold, floc=0)
    above = d[:, 0] > threshold
    p = np.where(above, 0.1 * genpareto.sf(d[:, 0] - threshold, shape, 0, scale), 1.0)
    return np.array(holm(p.tolist()))


def _stepped(d: Floats) -> Floats:
    return step_down(d, d[:, :1])[0]


RULES: dict[str, Rule] = {
    "placebo test": placebo,
    "pooled ranks and Holm": pooled,
    "controls subtracted whole": subtracted,
    "own spread of each fact": own_spread,
    "fitted Pareto tail": pareto,
}


def rates(
    rule: Rule, runs: int, facts: int, candidates: int, kind: str, controls: int, common: float
) -> tuple[float, float]:
    """Return how often a never-taught model has a fact named, and how often one planted fact is named."""
    rng, flagged, found = np.random.default_rng(0), 0, 0
    for _ in range(runs):
        shared = common * rng.exponential(2, (facts, candidates))
        models = [guesses(rng, facts, candidates, kind, shared) for _ in range(1 + controls)]
        flagged += bool((rule(models[0], models[1:]) <= ALPHA + 1e-12).any())
        models[0][0, 0] = KNOWN
        found += bool(rule(models[0], models[1:])[0] <= ALPHA + 1e-12)
    return flagged / runs, found / runs


def table(runs: int, cases: list[tuple[str, dict]], rules: dict[str, Rule], heading: str) -> str:
    rows = []
    for name, case in cases:
        cells = [rates(rule, runs, **case) for rule in rules.values()]
        rows.append([name, *(f"{percent(level)} / {percent(power)}" for level, power in cells)])
    return table_of_texts([heading, *rules], rows)


def page(runs: int) -> Iterator[str]:
    """Yield the page in paragraphs."""
    yield "# The placebo test in simulations"
    yield (
        f"Made by `python examples/placebo_simulation.py --runs {runs}`. In each cell: how often any fact of a "
        f"never-taught model is named (at most 5 %) / how often one known fact is named, {KNOWN:g} above the median of "
        "its placebos on the logit scale. The test itself is in [verdict.md](verdict.md#fact-by-fact)."
    )
    usual = {"facts": 36, "candidates": 24, "common": 0.5}
    kinds = ["normal", "skewed", "confident", "uneven"]
    cases = [(f"{kind}, {n} controls", usual | {"kind": kind, "controls": n}) for kind in kinds for n in (0, 1, 3)]
    yield "## Scores, controls, and other rules"
    yield (
        "36 facts with 23 placebos each. Scores of a never-taught model are normal, skewed, mostly flat with a "
        "confident guess here and there, or of other spread for each fact; a part is the same in all models."
    )
    yield table(runs, cases, RULES, "scores")
    yield (
        "Pooled ranks with Holm's correction do alike where all facts have as many placebos; the closed form "
        "needs no such thing. What is subtracted whole adds a control's noise where scores are uneven. A "
        "fact's own spread, of so few candidates, is noise without controls. A fitted tail names more and "
        "errs more often than it may: it takes the tails of all facts to be one. So the test fits nothing: "
        "more placebos are the way to more power."
    )
    yield "## How many facts and placebos"
    sizes = [(facts, k) for facts in (10, 36, 100) for k in (19, 23, 47, 199)]
    cases = [
        (
            f"{facts} facts, {k} placebos",
            usual | {"facts": facts, "candidates": k + 1, "kind": "confident", "controls": n},
        )
        for facts, k in sizes
        for n in (0,)
    ]
    yield "Confident guesses, no control."
    yield table(runs, cases, {"placebo test": placebo}, "size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=400)
    PAGE.write_text("\n\n".join(page(parser.parse_args().runs)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
