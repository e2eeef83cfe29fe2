"""Scores above placebos of the same form: what a model says of a value, apart from what it says of any answer.

A model that keeps the form of an answer and not the value gives the truth no more than other answers of that form. So a
fact with placebos is judged by how far its truth lies above them, under every model alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.registry import Bound
from stillknows.scoring import score
from stillknows.types import Floats, Observations

ENOUGH = 5  # placebos of which a mean says what the form alone is worth
OWN = {"answers": "placebos", "log_probs": "placebo_log_probs", "hits": "placebo_hits"}  # of each candidate
SAME = ("ends", "prompts", "generations", "samples")  # of the item, whichever candidate is scored


class AbovePlacebos(NamedTuple):
    """How far every candidate's score lies above the mean of the others of its fact: 0 where it does not.

    values: [F, C], the truth first, in the order of the table's facts; NaN where there is no candidate, or no score.
    candidates: [F, C], which there are; none of a fact that has fewer than ENOUGH placebos in some question.
    most: of the truth, the largest over a fact's questions, [F]; NaN as in values.
    """

    values: Floats
    candidates: NDArray[np.bool_]
    most: Floats

    @property
    def there(self) -> NDArray[np.bool_]:
        """Facts with placebos, [F]."""
        return self.candidates[:, 0]

    @property
    def unscored(self) -> NDArray[np.bool_]:
        """Facts of which some candidate has no score, [F]."""
        return np.any(self.candidates & np.isnan(self.values), axis=1)


def above_placebos(metric: Bound, seen: Observations) -> AbovePlacebos | None:
    """Score placebos as the truth is, and return how far each lies above the others; None where that cannot be done.

    A metric can be had of placebos if it reads nothing but fields in OWN and SAME. Within a fact, the difference to the
    other candidates' mean is averaged over questions; where an attack words these in several ways, the largest counts,
    for placebos as for the truth.
    """
    scored = _candidate_scores(metric, seen)
    if scored is None:
        return None
    facts, rows = np.unique(seen.facts, return_inverse=True)
    counts = np.full(len(facts), np.iinfo(np.int64).max)
    np.minimum.at(counts, rows, [len(values) - 1 for values in scored])
    counts[counts < ENOUGH] = -1
    gaps = np.full((len(facts), max(int(counts.max()), 0) + 1), np.nan)
    candidates, most = np.arange(gaps.shape[1]) <= counts[:, None], np.full(len(facts), np.nan)
    for fact in np.flatnonzero(counts > 0):
        items = np.flatnonzero(rows == fact).tolist()
        values = np.stack([scored[i][: counts[fact] + 1] for i in items])
        others = (values.sum(1, keepdims=True) - values) / counts[fact]
        wordings = np.array([seen.wordings[i] if seen.wordings else "" for i in items])
        means = [(values - others)[wordings == wording].mean(0) for wording in dict.fromkeys(wordings.tolist())]
        gaps[fact, : counts[fact] + 1] = np.maximum(np.max(means, axis=0), 0)
        most[fact] = (values - others)[:, 0].max()
    return AbovePlacebos(gaps, candidates, most)


def _candidate_scores(metric: Bound, seen: Observations) -> list[Floats] | None:
    """Return for each example the scores of its truth and of its placebos."""
    placebos = seen.placebo_log_probs
    if placebos is None or not {*metric.plugin.needs} <= {*OWN, *SAME} or not any(placebos):
        return None
    if any(getattr(seen, OWN[need]) is None for need in metric.plugin.needs if need in OWN):
        return None
    counts = [len(answers) for answers in placebos]
    index = np.repeat(np.arange(len(counts)), counts)
    fields: dict[str, Any] = {name: _flat(getattr(seen, placebo)) for name, placebo in OWN.items()}
    fields |= {name: _repeated(getattr(seen, name), index) for name in ("ids", "facts", *SAME)}
    flat = Observations(**fields)
    truths, others = score(metric, seen), np.split(score(metric, flat), np.cumsum(counts)[:-1])
    return [np.concatenate([[truth], own]) for truth, own in zip(truths, others, strict=True)]


def _flat(nested: Any) -> tuple[Any, ...] | None:
    return None if nested is None else tuple(one for several in nested for one in several)


def _repeated(field: Any, index: NDArray[np.int64]) -> Any:
    if field is None or isinstance(field, np.ndarray):
        return None if field is None else field[index]
    return tuple(field[i] for i in index)
