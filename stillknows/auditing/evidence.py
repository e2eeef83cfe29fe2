"""From observations to cells: every number of a report, with its bounds, computed from saved observations alone.

The unit is the fact: examples that ask for the same thing are averaged first, then facts are resampled. Subject,
controls and original are compared fact by fact under the SAME variant, so the damage that a format does by itself is
charged to nobody. Letters: s, c, o are a fact's score under the subject, the never-taught controls, the original.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from stillknows.auditing.relative import AbovePlacebos, above_placebos
from stillknows.errors import NotMeasured
from stillknows.labels import is_control
from stillknows.registry import Bound
from stillknows.scoring import score
from stillknows.stats import LEVEL, bootstrap, bounds, interval
from stillknows.types import CONTROL, FULL, ORIGINAL, Floats, Interval, Observations, Role

RETAINED_ROLES: tuple[Role, ...] = ("retain", "neighbour", "utility")  # what must stay as good as the original's
OTHER_FACTS = "the attack teaches some of the facts and is judged by the others, full precision by all"
MIN_GAP = 0.1  # the original must beat the control by this much on average, or the probe shows nothing


class CellKey(NamedTuple):
    """Where observations were made."""

    model: str
    variant: str
    split: str


@dataclass(frozen=True)
class Table:
    """Scores per fact, [F], of every place and metric. Every model has the same facts in the same order on a split.

    A score is NaN where there is none; `missing` says why where that is so for a whole split. `facts` names them.
    controls: the never-taught models that the others are compared with.
    above: how far the scores of truths and placebos lie above the others of their fact, for metrics in use as gates.
    need_control: facts whose placebos are not alike to a model that was never taught; they say nothing by themselves.
    guessable: facts whose true answer kept data give to the same question, as they do with few of their placebos.
    answers: how many different answers a split has.
    runs: how many tokens of a fact's answer are continued word for word at a stretch, [F], on the splits to forget.
    """

    scores: Mapping[tuple[CellKey, str], Floats]
    roles: Mapping[str, Role]
    controls: tuple[str, ...] = ()
    missing: Mapping[tuple[CellKey, str], str] = field(default_factory=dict)
    facts: Mapping[CellKey, tuple[str, ...]] = field(default_factory=dict)
    above: Mapping[tuple[CellKey, str], AbovePlacebos] = field(default_factory=dict)
    need_control: frozenset[str] = frozenset()
    guessable: frozenset[str] = frozenset()
    answers: Mapping[str, int] = field(default_factory=dict)
    runs: Mapping[CellKey, Floats] = field(default_factory=dict)

    @property
    def has_control(self) -> bool:
        """Whether there is a never-taught control."""
        return bool(self.controls)

    @property
    def forget_splits(self) -> list[str]:
        """The splits that are to be forgotten."""
        return [split for split, role in self.roles.items() if role == "forget"]

    def get(self, model: str, variant: str, split: str, metric: str) -> Floats:
        return self.scores[CellKey(model, variant, split), metric]


def tabulate(
    observations: Mapping[CellKey, Observations],
    metrics: Mapping[str, Bound],
    roles: Mapping[str, Role],
    *,
    gates: Collection[str] = (),
    need_control: Collection[str] = (),
    guessable: Collection[str] = (),
) -> Table:
    """Score all observations and average them over the examples of each fact; NaN where a metric has no answer.

    Args:
        gates: the metrics that verdicts rest on, of which placebos are scored as well.
        need_control: facts whose placebos say nothing without a control. guessable: see `Placebos`.
    """
    scores, missing, above = {}, {}, {}
    for place, seen in observations.items():
        for name, metric in metrics.items():
            try:
                values = score(metric, seen, observations.get(place._replace(model=CONTROL)))
            except NotMeasured as reason:
                values, missing[place, name] = np.full(len(seen.ids), np.nan), str(reason)
            scores[place, name] = _by_fact(seen, values)
            if name in gates and roles[place.split] == "forget" and (place, name) not in missing:
                found = above_placebos(metric, seen)
                above |= {(place, name): found} if found else {}
    facts = {place: tuple(np.unique(seen.facts).tolist()) for place, seen in observations.items()}
    controls = tuple(dict.fromkeys(place.model for place in observations if is_control(place.model)))
    answers = {place.split: len(set(seen.answers)) for place, seen in observations.items()}
    asked = {at: seen for at, seen in observations.items() if gates and roles[at.split] == "forget"}
    runs = {at: _longest_runs(seen) for at, seen in asked.items() if seen.hits is not None}
    return Table(
        scores, roles, controls, missing, facts, above, frozenset(need_control), frozenset(guessable), answers, runs
    )


def _longest_runs(seen: Observations) -> Floats:
    """Return by fact the longest run of answer tokens, in any of its questions, each of which is the likeliest."""
    facts, rows = np.unique(seen.facts, return_inverse=True)
    longest = np.zeros(len(facts))
    for row, hits in zip(rows, seen.hits or (), strict=False):
        misses = np.flatnonzero(~np.concatenate([[False], hits, [False]]))
        longest[row] = max(longest[row], np.diff(misses).max() - 1)
    return longest


def _by_fact(seen: Observations, values: Floats) -> Floats:
    """Return each fact's mean over its examples; where an attack words them in several ways, that of its worst wording.

    A fact with an example that has no score has none, in whatever wording.
    """
    facts, rows = np.unique(seen.facts, return_inverse=True)
    if seen.wordings is None:
        return np.bincount(rows, values) / np.bincount(rows)
    wordings, columns = np.unique(seen.wordings, return_inverse=True)
    cells, shape = rows * len(wordings) + columns, (len(facts), len(wordings))
    counts = np.bincount(cells, minlength=len(facts) * len(wordings)).reshape(shape)
    sums = np.bincount(cells, values, minlength=len(facts) * len(wordings)).reshape(shape)
    return np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf).max(1)


def mean(table: Table, place: CellKey, metric: str) -> Interval | str:
    """Return the mean score over facts."""
    scores = table.get(*place, metric)
    scored = scores[~np.isnan(scores)]
    if scored.size == 0:
        return table.missing.get((place, metric), "no item can be judged")
    return _interval(_mean, scored)


def unscored(table: Table, models: Iterable[str], place: CellKey, metric: str) -> dict[str, tuple[int, int]]:
    """Return, by model, how many of a split's facts have no score under it, such as NaN, and how many there are.

    A fact that is compared with placebos has none either where one of these has none. A model under which all facts
    have a score is left out.
    """
    found = {}
    for model in models:
        at = place._replace(model=model)
        missing = np.isnan(table.get(*at, metric))
        if (at, metric) in table.above:
            missing = missing | table.above[at, metric].unscored
        if missing.any():
            found[model] = int(missing.sum()), len(missing)
    return found


def recovery(table: Table, place: CellKey, metric: str) -> Interval | str:
    """Return R = Σ(s_v − s)/Σ(o_v − s): what of the forgotten a variant v brings back; 0 nothing, 1 all of it.

    s is the subject's score in full precision, s_v and o_v are subject and original under the variant. May be
    negative (the variant scores lower) or above 1.
    """
    full = place._replace(variant=FULL)
    if place.variant == FULL:
        return "recovery is measured against full precision"
    if (full, metric) not in table.scores:
        return "the variant 'full' was not measured"
    columns = [table.scores[at, metric] for at in (full, place, place._replace(model=ORIGINAL))]
    if len(columns[0]) != len(columns[1]):
        return OTHER_FACTS
    rows = np.stack(columns)
    s, s_v, o_v = rows[:, ~np.isnan(rows).any(0)]
    if len(s) == 0 or gap_low(s, o_v) <= MIN_GAP:
        return "nothing to recover: in full precision it scores like the original does here"
    return _interval(position, s_v, s, o_v)


def share(table: Table, place: CellKey, metric: str, base: str | None = None) -> Interval | str:
    """Return Σs/Σo, the share of the original's score, with the original under the variant `base`: the subject's own
    without one, FULL for that in full precision.

    From 0 up; 1 scores like the original. On a split to keep, this is the utility. On a split to forget, it is "the
    forgotten knowledge kept" of arXiv 2410.16454 (21 % in full precision, 83 % in 4 bits), a reading that gives both
    numbers from its table 1, in each variant by itself. No control is subtracted, so that a model that was never
    taught is far above 0 where answers can be guessed: read it beside the knowledge kept.
    """
    base = base or place.variant
    original = place._replace(model=ORIGINAL, variant=base)
    if (original, metric) not in table.scores:
        return f"the variant {base!r} was not measured"
    columns = [table.scores[place, metric], table.scores[original, metric]]
    if len(columns[0]) != len(columns[1]):
        return OTHER_FACTS
    rows = np.stack(columns)
    s, o = rows[:, ~np.isnan(rows).any(0)]
    if len(o) == 0:
        return "no fact has a score under both models"
    if o.sum() == 0:
        return "the original itself scores 0 here"
    return _interval(_ratio, s, o)


def _interval(statistic, *columns: Floats) -> Interval:
    return interval(float(statistic(*columns)), bootstrap(statistic, *columns), len(columns[0]))


def gap_low(low: Floats, high: Floats) -> float:
    """Return the lower bound of the mean of high − low."""
    return bounds(bootstrap(_mean, high - low), LEVEL)[0]


def _mean(a: Floats) -> Floats:
    return a.mean(-1)


def _ratio(a: Floats, b: Floats) -> Floats:
    return a.sum(-1) / b.sum(-1)


def position(a: Floats, zero: Floats, one: Floats) -> Floats:
    """Return where a lies between what counts as 0 and what counts as 1."""
    return (a - zero).sum(-1) / (one - zero).sum(-1)
