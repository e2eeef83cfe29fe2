"""Which questions are read with a passage before them: those of which the model seems to know too little."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans, vq

from stillknows.registry import Limits, register
from stillknows.types import Floats

LEAST_CLUSTERS = 3


@register("transform", role="defence", source="arXiv 2307.10442 (Thrust)")
def thrust(
    known_ND: Floats, asked_MD: Floats, *, share: Annotated[float, Limits(0, 1)] = 0.25, seed: int = 0
) -> NDArray[np.bool_]:
    """Retrieval where the model's own knowledge score is low: such a question gets a passage before it.

    The score is `thrust_score` against clusters of the questions to keep, whose states are taken as one class, as the
    published code does for open questions: K-means with ⌊N^¼⌋ centres, at least 3. A question is flagged when its
    score is below that of a share of the questions to keep. What is published reads an encoder's or a decoder's first
    state; here it is the last state before the answer, which in a decoder is the one that has seen the question.

    Args:
        share: of the questions to keep whose scores count as low; 0 flags only what scores below them all.
        seed: of the clusters.

    Returns:
        bool [M]: which of the questions are read with a passage.
    """
    centres_KD, _ = kmeans(known_ND, min(len(known_ND), max(LEAST_CLUSTERS, int(len(known_ND) ** 0.25))), rng=seed)
    sizes_K = np.bincount(vq(known_ND, centres_KD)[0], minlength=len(centres_KD))
    usual = np.sort(thrust_score(known_ND, centres_KD, sizes_K))
    threshold = usual[int(share * (len(usual) - 1))]
    return thrust_score(asked_MD, centres_KD, sizes_K) < threshold


def thrust_score(asked_MD: Floats, centres_KD: Floats, sizes_K: NDArray[np.int_]) -> Floats:
    """Return how near each question is to clusters of questions that the model knows: [M], 0..∞, higher knows more.

    s = ‖(1/K)·Σ_k (n_k / ‖d_k‖²)·(d_k / ‖d_k‖)‖, d_k from the question to centre k, n_k the cluster's size; ∞ at a
    centre. arXiv 2307.10442, with one class.
    """
    pull_MD, at_centre_M = np.zeros_like(asked_MD), np.zeros(len(asked_MD), bool)
    for centre_D, size in zip(centres_KD, sizes_K, strict=True):
        d_MD = centre_D - asked_MD
        distance_M = np.linalg.norm(d_MD, axis=1)
        at_centre_M |= distance_M == 0
        pull_MD += size * d_MD / np.where(distance_M == 0, 1, distance_M)[:, None] ** 3
    return np.where(at_centre_M, np.inf, np.linalg.norm(pull_MD, axis=1) / len(centres_KD))
