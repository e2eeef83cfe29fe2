"""Signals of what hidden states hold: one formula each, on arrays. Letters: H decoder blocks, N items; see `types`.

Five of them say how far a model has come from the original towards a never-taught one, in the same way: `gap` is how
far these two lie apart, `moved` how far the model has moved, and what counts is `erased`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.depth.thrust import Clusters, thrust_score
from stillknows.types import Floats

LEAST_GAP = 0.05  # nats: a block in which original and control lie nearer than that holds no knowledge
RIDGE = 0.1  # of the mean squared length of the states
SHUFFLES = 5  # of the answers, for the probe's control


class Erased(NamedTuple):
    """How far knowledge is erased: 0 as in the original, 1 as in the never-taught control.

    values_N: of each item, NaN where no block tells the original from the control; shares_HN: in each block, likewise.
    """

    values_N: Floats
    shares_HN: Floats


def erased(gap_HN: Floats, moved_HN: Floats, least: float = LEAST_GAP) -> Erased:
    """Return shares clip(moved/gap, 0, 1) where gap > least, and Σ shares·gap / Σ gap over the blocks of each item."""
    holds_HN = gap_HN > least
    with np.errstate(divide="ignore", invalid="ignore"):
        shares_HN = np.where(holds_HN, np.clip(moved_HN / gap_HN, 0, 1), np.nan)
        weights_HN = np.where(holds_HN, gap_HN, 0.0)
        values_N = np.where(holds_HN, shares_HN * gap_HN, 0.0).sum(0) / weights_HN.sum(0)
    return Erased(values_N, shares_HN)


def unlearning_depth(own_N: Floats, control_HN: Floats, subject_HN: Floats) -> Erased:
    """Return the unlearning depth score: 0..1, higher is more erased; 0 for the original, 1 for the control itself.

    Δ = s − s_l: how far the answer's mean ln p under the original drops (nats per token) when the output of block l is
    another model's, at the places that predict the answer. Blocks with Δ > .05 for the control hold the knowledge.
    Source: arXiv 2605.24614.

    Args:
        own_N: the original's mean ln p of each answer.
        control_HN, subject_HN: the same with a block's output taken from the control, from the subject.
    """
    return erased(own_N - control_HN, own_N - subject_HN)


def logit_lens(original_HN: Floats, control_HN: Floats, subject_HN: Floats) -> Erased:
    """Return how far answers can no longer be read off: 0..1, higher is more erased; 0 the original, 1 the control.

    Given is the mean ln p of each answer (nats per token) when the output of a block goes straight through the
    original's last norm and output layer. Source: nostalgebraist 2020; as a score, arXiv 2605.24614.
    """
    return erased(original_HN - control_HN, original_HN - subject_HN)


def fisher(original_HN: Floats, control_HN: Floats, subject_HN: Floats) -> Erased:
    """Return 1 − clip((F_c − F_s)/(F_c − F_o), 0, 1): 0..1, higher is more erased; 0 the original, 1 the control.

    F is the trace of the empirical Fisher information of a block's weights: the squared gradient of an answer's mean
    ln p, any number ≥ 0. It is higher where an answer was never learned. Source: arXiv 2605.24614, which keeps the
    weights that matter most; here all count.
    """
    return erased(control_HN - original_HN, subject_HN - original_HN, least=0.0)


def thrust_drop(original_HN: Floats, control_HN: Floats, subject_HN: Floats) -> Erased:
    """Return how far the Thrust score of questions has dropped: 0..1, higher is more erased; 0 the original, 1 the
    control. Given is ln s by block, s of `thrust.thrust_score`. Source: arXiv 2307.10442."""
    return erased(original_HN - control_HN, original_HN - subject_HN)


def log_thrust(known_HND: Floats, asked_HMD: Floats) -> Floats:
    """Return ln s of questions by block, [H, M], against clusters of the questions that are to be kept."""
    pairs = zip(known_HND, asked_HMD, strict=True)
    with np.errstate(divide="ignore"):
        return np.log([thrust_score(asked_MD, *Clusters.of(known_ND)) for known_ND, asked_MD in pairs])


def linear_cka(x_ND: Floats, y_NE: Floats) -> float:
    """Return ‖X'Y‖² / (‖X'X‖·‖Y'Y‖), columns centred, Frobenius norms: 0..1, 1 where the states differ by a rotation
    and a scale; NaN where all states are alike. Of few items it is above 0 for unlike states too. arXiv 1905.00414."""
    x_ND, y_NE = (a - a.mean(0) for a in (x_ND, y_NE))
    x_NN, y_NN = x_ND @ x_ND.T, y_NE @ y_NE.T  # as many entries as items have pairs, however wide the states are
    with np.errstate(invalid="ignore"):
        return float((x_NN * y_NN).sum() / (np.linalg.norm(x_NN) * np.linalg.norm(y_NN)))


def cka_erasure(original_HND: Floats, control_HND: Floats, subject_HND: Floats) -> Erased:
    """Return clip((CKA(s, c) − CKA(o, c)) / (1 − CKA(o, c)), 0, 1), blocks weighted by 1 − CKA(o, c): 0..1, higher is
    more erased; 0 the original, 1 the control. All items make one number: [1], shares [H, 1].

    Source: arXiv 2605.24614.
    """
    o_H, s_H = (
        np.array([linear_cka(x, c) for x, c in zip(states, control_HND, strict=True)])
        for states in (original_HND, subject_HND)
    )
    return erased(1 - o_H[:, None], (s_H - o_H)[:, None], least=0.0)


class Probe(NamedTuple):
    """What a linear map from states to answers is trained on: states [H, N, D] and answers [N, E] of kept questions."""

    known_HND: Floats
    answers_NE: Floats

    def ranks(self, asked_HMD: Floats, truths_ME: Floats, others: Sequence[Floats]) -> Floats:
        """Return by block how many other answers lie below the true one, [H, M]: 0..1, ½ by chance, 1 all of them.

        A ridge regression from states before answers to vectors of answers, trained on kept questions, so on other
        items than it is asked for; answers are compared with what it predicts by their cosine.
        """
        pairs = zip(self.known_HND, asked_HMD, strict=True)
        mean_E = self.answers_NE.mean(0)
        return np.array(
            [
                [
                    _beaten(predicted_E, truth_E - mean_E, others_KE - mean_E)
                    for predicted_E, truth_E, others_KE in zip(
                        ridge(known_ND, self.answers_NE - mean_E, asked_MD), truths_ME, others, strict=True
                    )
                ]
                for known_ND, asked_MD in pairs
            ]
        )

    def shuffled(self, seed: int) -> Probe:
        """Return the probe's control: the same answers, to other questions."""
        order = np.random.default_rng(seed).permutation(len(self.answers_NE))
        return self._replace(answers_NE=self.answers_NE[order])

    def random_ranks(self, asked_HMD: Floats, truths_ME: Floats, others: Sequence[Floats]) -> Floats:
        """Return the mean over shuffled answers of what the probe gives, [H, M]."""
        found = [self.shuffled(seed).ranks(asked_HMD, truths_ME, others) for seed in range(SHUFFLES)]
        return np.mean(found, axis=0)


def ridge(x_ND: Floats, y_NE: Floats, asked_MD: Floats) -> Floats:
    """Return what a ridge regression of centred y on centred x predicts, [M, E]; see RIDGE."""
    mean_D = x_ND.mean(0)
    x_ND, asked_MD = x_ND - mean_D, asked_MD - mean_D
    kernel_NN = x_ND @ x_ND.T
    penalty = RIDGE * np.trace(kernel_NN) / len(kernel_NN)
    weights_NE = np.linalg.solve(kernel_NN + penalty * np.eye(len(kernel_NN)), y_NE)
    return asked_MD @ x_ND.T @ weights_NE


def _beaten(predicted_E: Floats, truth_E: Floats, others_KE: Floats) -> float:
    own, other_K = _cosine(predicted_E, truth_E[None])[0], _cosine(predicted_E, others_KE)
    return float(((own > other_K) + (own == other_K) / 2).mean())


def _cosine(a_E: Floats, b_KE: Floats) -> Floats:
    return b_KE @ a_E / np.maximum(np.linalg.norm(b_KE, axis=1) * np.linalg.norm(a_E), 1e-30)


def probed(original_HM: Floats, subject_HM: Floats, guess_H: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return what a probe finds, as (subject's gain [M], original's gain [M], which blocks count [H]).

    A gain is the rank less a guess (the mean rank of shuffled answers, or of the control where that is higher), summed
    over the blocks in which the original's mean gain is above LEAST_GAP. Σ gain_s / Σ gain_o is the share that can
    still be read off: 0 as by guessing, 1 as in the original.
    """
    holds_H = original_HM.mean(1) - guess_H > LEAST_GAP
    gained, possible = ((ranks_HM - guess_H[:, None])[holds_H].sum(0) for ranks_HM in (subject_HM, original_HM))
    return gained, possible, holds_H
