"""Whether single examples were trained on: their scores against those of examples that no model was trained on.

Attacks compare a model with reference models that were not trained on the examples either. What an attack says of a
true answer is held against what it says of placebos, which are answers to the same questions that nobody was taught:
never-inserted canaries. Letters: N examples, Z placebos of all of them, M reference models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.gate.candidate_scores import logit
from stillknows.stats import LEVEL, bounds, mean_interval
from stillknows.types import Floats, Interval

OFFLINE = 0.3  # RMIA's a: how far a model that was trained on an example is expected to be above those that were not
FPR = 0.05  # share of never-inserted examples that are called members
DRAWS = 200  # of the reference models and of the placebos' facts
STABLE = 0.95  # share of the draws in which a decision must be the same
RATIO, LIKELIHOOD = "rmia", "lira"
NO_PLACEBOS = "no answers are known that could have been true"
NO_SCORE = "a model gives no probability for some of the answers"
FEW_REFERENCES = {
    RATIO: "there is no reference model beside it",
    LIKELIHOOD: "there are fewer than two reference models",
}
LEAST_REFERENCES = {RATIO: 1, LIKELIHOOD: 2}


class ExampleScores(NamedTuple):
    """What models say of examples: mean ln p per token.

    truths_N, placebos_Z: of one model; owners_Z: whose placebo each is, an index of the examples.
    """

    truths_N: Floats
    placebos_Z: Floats
    owners_Z: NDArray[np.int64]


def rmia_ratios(target: Floats, references: Floats, a: float = OFFLINE) -> Floats:
    """Return p / (½·((1 + a)·p_out + (1 − a))): any number ≥ 0, higher is more likely a member.

    p is exp(mean ln p) under the model, [N], p_out its mean over the reference models, [M, N], none of which was
    trained on the examples (offline form). What counts is the share of a population, here of the placebos, whose ratio
    is lower. Source: RMIA, arXiv 2312.03262.
    """
    return np.exp(target) / (0.5 * ((1 + a) * np.exp(references).mean(0) + (1 - a)))


def lira_scores(target: Floats, references: Floats, spread: float) -> Floats:
    """Return (φ − μ_out)/σ: any number, higher is more likely a member; φ = ln(p/(1 − p)), [N], μ_out its mean over the
    reference models, [M, N], σ one spread for all examples, as few models allow. Source: LiRA's offline attack with
    fixed variance, arXiv 2112.03570."""
    return (target - references.mean(0)) / spread


def pooled_spread(references: Floats) -> float:
    """Return the standard deviation of φ between reference models, [M, N], M ≥ 2, as one number for all examples."""
    return max(float(np.sqrt(references.var(0, ddof=1).mean())), 1e-12)


def exposure(truth: float, others: Floats) -> float:
    """Return log2(K + 1) − log2(rank) of a canary among it and K others: bits, 0..log2(K + 1), higher gives more away.

    Ranks are of ln p, from 1 for the likeliest; of ties the mean. A canary that was never inserted has about 1.44 bits
    on average. Source: arXiv 1802.08232, with a rank among the others that are there; it is not extrapolated.
    """
    rank = 1 + np.count_nonzero(others > truth) + np.count_nonzero(others == truth) / 2
    return float(np.log2(len(others) + 1) - np.log2(rank))


class MemberExample(NamedTuple):
    """What an attack says of one example.

    score: share of all placebos of which it says less, 0..1, with one-sided bounds over draws of the reference models
        and of the facts whose placebos these are.
    member: whether the score is above 1 − FPR. agreement: share of the draws in which that is the same, 0..1.
    """

    example: str
    score: float
    low: float
    high: float
    member: bool
    agreement: float


@dataclass(frozen=True)
class MembershipAttack:
    """One attack on one model. auc: P(a true answer scores above a placebo) with bounds over facts; ½ is chance."""

    name: str
    auc: Interval
    examples: tuple[MemberExample, ...]


def attack(
    name: str,
    examples: Sequence[str],
    facts: Sequence[str],
    target: ExampleScores,
    references: Sequence[ExampleScores],
    seed: int = 0,
) -> MembershipAttack:
    """Return what RATIO or LIKELIHOOD says of each example; `facts` are the units of bounds and draws."""
    values = _attack(name, target, references)
    truths_N, placebos_Z = values(np.arange(len(references)))
    scores_N = _above(truths_N, placebos_Z, np.ones((1, len(placebos_Z))))[0]
    rng, (_, of_fact_N) = np.random.default_rng(seed), np.unique(facts, return_inverse=True)
    count, unit_Z = int(of_fact_N.max()) + 1, of_fact_N[target.owners_Z]
    drawn_KN = np.empty((DRAWS, len(scores_N)))
    for k in range(DRAWS):
        models = rng.integers(0, len(references), len(references))
        weights_Z = np.bincount(rng.integers(0, count, count), minlength=count)[unit_Z].astype(float)
        drawn_KN[k] = _above(*values(models), weights_Z[None])[0] if weights_Z.any() else np.nan
    found = []
    for example, score, drawn_K in zip(examples, scores_N.tolist(), drawn_KN.T, strict=True):
        member = score > 1 - FPR
        found.append(
            MemberExample(
                example, score, *bounds(drawn_K, LEVEL), member, float(((drawn_K > 1 - FPR) == member).mean())
            )
        )
    return MembershipAttack(name, mean_interval(scores_N, facts), tuple(found))


def _attack(
    name: str, target: ExampleScores, references: Sequence[ExampleScores]
) -> Callable[[NDArray[np.int64]], tuple[Floats, Floats]]:
    """Return f(which reference models): what the attack says of the truths [N] and of the placebos [Z]."""
    truths_MN, placebos_MZ = (
        np.array([getattr(scores, field) for scores in references]) for field in ("truths_N", "placebos_Z")
    )
    if name == RATIO:
        return lambda models: (
            rmia_ratios(target.truths_N, truths_MN[models]),
            rmia_ratios(target.placebos_Z, placebos_MZ[models]),
        )
    own_N, own_Z, out_MN, out_MZ = (logit(x) for x in (target.truths_N, target.placebos_Z, truths_MN, placebos_MZ))
    spread = pooled_spread(np.concatenate([out_MN, out_MZ], 1))
    return lambda models: (lira_scores(own_N, out_MN[models], spread), lira_scores(own_Z, out_MZ[models], spread))


def _above(truths_N: Floats, placebos_Z: Floats, weights_KZ: Floats) -> Floats:
    """Return by row of weights the share of the placebos below each truth, ties half, [K, N]."""
    order = np.argsort(placebos_Z, kind="stable")
    reached_KZ = np.concatenate([np.zeros((len(weights_KZ), 1)), np.cumsum(weights_KZ[:, order], 1)], 1)
    left, right = (np.searchsorted(placebos_Z[order], truths_N, side) for side in ("left", "right"))
    return (reached_KZ[:, left] + reached_KZ[:, right]) / 2 / reached_KZ[:, -1:]
