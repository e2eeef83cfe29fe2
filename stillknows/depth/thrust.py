"""Whether a model seems to know about a question: how near its state is to those of questions that it knows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.types import Floats

LEAST_CLUSTERS = 3


class Clusters(NamedTuple):
    """Centres of the states of known questions, and how many states are nearest to each."""

    centres_KD: Floats
    sizes_K: NDArray[np.int_]

    @classmethod
    def of(cls, known_ND: Floats, seed: int = 0) -> Clusters:
        """Return the clusters of K-means with ⌊N^¼⌋ centres, at least 3: of one class, as for open questions."""
        from scipy.cluster.vq import kmeans, vq

        count = min(len(known_ND), max(LEAST_CLUSTERS, int(len(known_ND) ** 0.25)))
        centres_KD, _ = kmeans(known_ND, count, rng=seed)
        return cls(centres_KD, np.bincount(vq(known_ND, centres_KD)[0], minlength=len(centres_KD)))


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
