"""Scores of true answers and placebos, and how far each stands out from the other candidates of its fact.

Letters: F facts, C candidates of a fact (the true answer first, then its placebos), W wordings of its question, V
variants of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.types import Floats

Flags = NDArray[np.bool_]
MAX_LOG_PROB = -1e-9  # so that the logit of an answer that is certain is finite: at most 20.7
MIN_LOG_PROB = -1e4  # likewise for one that is impossible


@dataclass(frozen=True)
class CandidateScores:
    """How likely one model finds every candidate answer: a score of which more means likelier, such as `logit`.

    values: [F, C, W, V]; candidate 0 is the true answer. NaN and infinities are no scores: see `unscored`.
    candidates: [F, C], which candidates there are; facts may have different numbers of placebos.
    asked: [F, W, V], which wordings of a fact are asked in which variant. An attack that teaches some of the facts
        asks for the others only. Truth and placebos are asked alike: that is what the test rests on.

    Raises ValueError for shapes that do not fit, for a fact without a true answer or that is asked nowhere, and for
    names that are not as many as the axes are long or not all different.
    """

    facts: tuple[str, ...]
    variants: tuple[str, ...]
    values: Floats
    candidates: Flags
    asked: Flags

    def __post_init__(self) -> None:
        facts, candidates, wordings, variants = self.values.shape
        if (self.candidates.shape, self.asked.shape) != ((facts, candidates), (facts, wordings, variants)):
            shapes = self.values.shape, self.candidates.shape, self.asked.shape
            raise ValueError("the shapes of values, candidates and asked do not fit: {}, {}, {}".format(*shapes))
        for names, count in ((self.facts, facts), (self.variants, variants)):
            if len(names) != count or len(set(names)) != count or not count:
                raise ValueError(f"{count} facts or variants, {len(names)} names, {len(set(names))} different ones")
        if not self.candidates[:, 0].all() or not np.any(self.asked, axis=(1, 2)).all():
            raise ValueError("every fact needs a true answer and a question")

    @property
    def placebos(self) -> NDArray[np.int64]:
        """How many placebos each fact has, [F]."""
        return self.candidates[:, 1:].sum(1)

    @property
    def unscored(self) -> Flags:
        """Facts of which some candidate has no finite score in some cell that was asked, [F]."""
        cells = self.candidates[:, :, None, None] & self.asked[:, None]
        return np.any(cells & ~np.isfinite(self.values), axis=(1, 2, 3))

    def of(self, rows: Any) -> CandidateScores:
        """Return the scores of some of the facts: indices or flags."""
        names = tuple(np.array(self.facts, dtype=object)[rows])
        return CandidateScores(names, self.variants, self.values[rows], self.candidates[rows], self.asked[rows])

    def within(self, chosen: Callable[[str], bool]) -> CandidateScores | None:
        """Return the scores in some of the variants, of the facts that are asked there; None where there are none."""
        columns = np.array([chosen(name) for name in self.variants])
        asked = self.asked[..., columns]
        rows = np.any(asked, axis=(1, 2))
        if not rows.any():
            return None
        names = tuple(name for name, keep in zip(self.variants, columns, strict=True) if keep)
        facts = tuple(np.array(self.facts, dtype=object)[rows])
        return CandidateScores(facts, names, self.values[rows][..., columns], self.candidates[rows], asked[rows])

    def fits(self, other: CandidateScores) -> bool:
        """Whether another model was asked the same."""
        return (self.facts, self.variants) == (other.facts, other.variants) and all(
            np.array_equal(mine, theirs)
            for mine, theirs in ((self.candidates, other.candidates), (self.asked, other.asked))
        )


def logit(log_probs: Floats) -> Floats:
    """Return ln p − ln(1 − p) of natural log-probabilities, higher = likelier; NaN stays NaN.

    Log-probabilities are first brought between MIN_LOG_PROB and MAX_LOG_PROB, so that all others give finite numbers.
    """
    bounded = np.clip(log_probs, MIN_LOG_PROB, MAX_LOG_PROB)
    return bounded - np.log(-np.expm1(bounded))


def centred(scores: CandidateScores) -> Floats:
    """Return the mean score over the wordings minus the fact's median over its candidates, [F, C, V].

    0 where a variant does not ask for a fact, NaN where there is no candidate. The truth counts in the median like
    every placebo, so that exchanging candidates exchanges what is returned and changes nothing else. Needs finite
    scores.
    """
    asked = scores.asked[:, None]
    means = np.where(asked, scores.values, 0.0).sum(2) / np.maximum(asked.sum(2), 1)
    means = np.where(scores.candidates[:, :, None], means, np.nan)
    return means - np.nanmedian(means, axis=1, keepdims=True)


class Standing(NamedTuple):
    """How far candidates stand out from the others of their fact.

    d: (s − max(c, 0)) / spread, [F, C, V]; −inf where a variant does not ask for a fact, NaN where there is no
        candidate.
    expected: max(c, 0), [F, C, V], how far the controls let a candidate stand out. spread: [V].
    """

    d: Floats
    expected: Floats
    spread: Floats


def standing_out(scores: CandidateScores, controls: Sequence[CandidateScores] = (), *, below: bool = False) -> Standing:
    """Return how far each candidate stands out from those of its fact, in units of the variant's spread.

    s and c are the centred scores of the model and of the mean of its controls, with the other sign where `below` asks
    how far candidates lie below the others. A candidate has to stand out by itself and against the controls: min(s, s
    − c) = s − max(c, 0). So a guess that all models make is taken away, and a candidate that controls happen to
    dislike gains nothing. spread is the median of |s − max(c, 0)| over the candidates of all facts (1 where that is
    0), so that no variant drowns the others. All steps treat truth and placebos alike.

    Raises ValueError for controls that were asked something else, and for scores that are not finite.
    """
    for other in (scores, *controls):
        if not other.fits(scores):
            raise ValueError("a control was not asked what the model was asked")
        if other.unscored.any():
            raise ValueError(f"{int(other.unscored.sum())} facts have no finite scores")
    sign = -1 if below else 1
    s_FCV = sign * centred(scores)
    expected_FCV = np.zeros_like(s_FCV)
    if controls:
        expected_FCV = np.maximum(sign * np.mean([centred(control) for control in controls], axis=0), 0)
    asked_FCV = np.broadcast_to(np.any(scores.asked, axis=1)[:, None], s_FCV.shape)
    d_FCV = s_FCV - expected_FCV
    sizes_FCV = np.abs(np.where(asked_FCV, d_FCV, np.nan))
    spread_V = np.array([_spread(sizes_FCV[..., v]) for v in range(len(scores.variants))])
    d_FCV = np.where(asked_FCV, d_FCV / spread_V, -np.inf)
    return Standing(np.where(scores.candidates[:, :, None], d_FCV, np.nan), expected_FCV, spread_V)


def _spread(sizes: Floats) -> float:
    known = sizes[~np.isnan(sizes)]
    return (float(np.median(known)) if known.size else 0.0) or 1.0
