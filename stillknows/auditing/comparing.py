"""A subject compared with its controls, fact by fact: how much knowledge it keeps, and which facts it knows.

A fact with placebos is compared by how far its truth lies above them, so that the form of an answer is no knowledge;
one without by its score as it is, which needs a never-taught control. Letters: s, c, o are what a fact has under the
subject, the controls and the original.
"""

from __future__ import annotations

from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.auditing.evidence import MIN_GAP, CellKey, Table, gap_low
from stillknows.stats import LEVEL, binomial_bounds, bounds, resampled_counts
from stillknows.types import ORIGINAL, Floats, Interval

KNOWN_SHARE = 0.5  # a fact is known when its score is more than half-way from the control's to the original's
NO_CONTROL = "there is no never-taught control, and no placebos that could stand in for one"
Flags = NDArray[np.bool_]


class Scored(NamedTuple):
    """What the facts of one place have under subject, controls and original, [F]; NaN where a model has no score.

    s, c, o: above their placebos where a fact has some, else as they are. c is the largest of any control: a guess that
        one of them makes is a guess; 0 without a control.
    relative: which facts have placebos. comparable: those, and all others where there is a control.
    gap_s, gap_o: what subject and original have beyond the controls' mean and beyond their own placebos: 0 on average
        for a model that was never taught.
    most: s of the question of a fact that gives most, where it has placebos.
    luck_FC: what each placebo in the truth's place would have, less the mean; NaN where there is none.
    part_FC: what the truth and each placebo has of what the original gives the truth, beyond the controls: 1 as much;
        of all that there is where the original gives nothing. NaN where there is no candidate.
    """

    s: Floats
    c: Floats
    o: Floats
    relative: Flags
    comparable: Flags
    gap_s: Floats
    gap_o: Floats
    most: Floats
    luck_FC: Floats
    part_FC: Floats

    @property
    def scored(self) -> Flags:
        """Facts that can be compared and have a score under all models."""
        return self.comparable & ~np.isnan(self.s + self.c + self.o + self.gap_s + self.gap_o)

    @property
    def known(self) -> Flags:
        """Facts that count as known: see `is_known`."""
        return is_known(self.s, self.c, self.o)


class KnowledgeKept(NamedTuple):
    """Knowledge kept by a subject in one variant, with the resamples that its test needs.

    kept: Σ gap_s / Σ gap_o (see `Scored`); 0 as never taught, 1 as the original. No upper bound while a fact has no
        score.
    known: share of testable facts that are known, with exact bounds. A fact that has no score under one of the models
        is one of them; the upper bound takes it for known.
    told: share of the facts that the original knows of which the gate can tell whether they are known, 0..1.
    resamples: of K, the lower of what all facts show and what those show whose answers kept data do not suggest: a leak
        is to be seen in both.
    alone: how many facts have neither placebos nor a control to be compared with.
    """

    kept: Interval
    known: Interval
    told: float
    alone: int
    resamples: Floats


def scored(table: Table, place: CellKey, metric: str) -> Scored:
    """Return what the facts of a place have under all models that it takes to judge one."""
    models = (place.model, *table.controls, ORIGINAL)
    raw_MF = np.stack([table.get(model, place.variant, place.split, metric) for model in models])
    relative, above_MFC = _above(table, place, metric, models)
    s, *controls, o = np.where(relative, above_MFC[:, :, 0], raw_MF)
    c, mean_c = (np.max(controls, 0), np.mean(controls, 0)) if controls else (np.zeros_like(s), np.zeros_like(s))
    beyond_MFC = above_MFC - (above_MFC[1:-1].mean(0) if controls else 0.0)
    others_MF = _mean_over_placebos(beyond_MFC)
    gaps_MF = np.where(relative, beyond_MFC[:, :, 0] - others_MF, raw_MF - mean_c)
    luck_FC = beyond_MFC[0, :, 1:] - others_MF[0][:, None]
    c_FC = above_MFC[1:-1].max(0) if controls else np.zeros_like(above_MFC[0])
    room_FC = above_MFC[-1, :, :1] - c_FC
    part_FC = (above_MFC[0] - c_FC) / np.where(room_FC > MIN_GAP, room_FC, 1.0)
    most = table.above[place, metric].most if relative.any() else s
    return Scored(s, c, o, relative, relative | bool(controls), gaps_MF[0], gaps_MF[-1], most, luck_FC, part_FC)


def _above(table: Table, place: CellKey, metric: str, models: tuple[str, ...]) -> tuple[Flags, Floats]:
    """Return which facts all models scored placebos of, [F], and how far candidates lie above the others, [M, F, C]."""
    facts = len(table.get(*place, metric))
    found = [table.above.get((place._replace(model=model), metric)) for model in models]
    if any(one is None or one.values.shape != found[0].values.shape for one in found if found[0] is not None):
        found = [None]
    if found[0] is None:
        return np.zeros(facts, dtype=bool), np.full((len(models), facts, 1), np.nan)
    relative = np.all([one.there for one in found if one], axis=0)
    if not table.controls:
        names = table.facts.get(place, ())
        relative = relative & ~np.array([fact in table.need_control for fact in names], dtype=bool)
    values = np.stack([np.where(one.unscored[:, None], np.nan, one.values) for one in found if one])
    return relative, values


def _mean_over_placebos(values_MFC: Floats) -> Floats:
    """Return the mean over a fact's placebos, [M, F]; NaN without any, and where the truth has no score."""
    there = ~np.isnan(values_MFC[:, :, 1:])
    sums = np.where(there, values_MFC[:, :, 1:], 0.0).sum(2)
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(values_MFC[:, :, 0]), np.nan, sums / there.sum(2))


def compare(table: Table, place: CellKey, metric: str) -> KnowledgeKept | str:
    """Compare a subject with both controls, or say in words why that is not possible."""
    found = scored(table, place, metric)
    nothing = np.isnan(found.s) & np.isnan(found.o) & (np.isnan(found.c) | (not table.has_control))
    if not found.comparable.any():
        return NO_CONTROL
    rows = found.scored
    if not rows.any():
        return "no fact has a score under all three models"
    unscored, gap_o = int((~nothing & ~rows).sum()), found.gap_o[rows]
    if gap_low(np.zeros_like(gap_o), gap_o) <= MIN_GAP:
        return _no_knowledge(table, place, metric)
    kept, resamples = _kept(found, unscored)
    guessable = np.array([fact in table.guessable for fact in table.facts.get(place, ())], dtype=bool)
    if guessable.any():
        rest = Scored(*map(itemgetter(~guessable), found))
        resamples = np.minimum(resamples, _leak_resamples(rest, unscored, len(resamples)))
    s, c, o = (values[rows] for values in (found.s, found.c, found.o))
    knows, tells, gap_s = o > MIN_GAP, o - c > MIN_GAP, found.gap_s[rows]
    known = is_known(s, c, o)
    explained = (gap_o > MIN_GAP) & (gap_s > KNOWN_SHARE * gap_o) & ~tells  # known, but for a control's guess
    trials = int((tells | known | explained).sum()) + unscored
    low = binomial_bounds(int(known.sum()), trials, LEVEL)[0]
    high = binomial_bounds(int((known | explained).sum()) + unscored, trials, LEVEL)[1]
    told = float(tells[knows].mean()) if knows.any() else 0.0
    share = Interval(float(known.sum()) / trials, low, high, trials)
    return KnowledgeKept(kept, share, told, int((~found.comparable).sum()), resamples)


def _leak_resamples(found: Scored, unscored: int, draws: int) -> Floats:
    """Return resamples of the knowledge kept, [draws]; −∞ where the original shows too little of these facts."""
    gap_o = found.gap_o[found.scored]
    if not gap_o.size or gap_low(np.zeros_like(gap_o), gap_o) <= MIN_GAP:
        return np.full(draws, -np.inf)
    return _kept(found, unscored)[1]


def _no_knowledge(table: Table, place: CellKey, metric: str) -> str:
    """Say that the original's scores are none of a model that knows."""
    models = {"the original": ORIGINAL, **{f"the never-taught {name}": name for name in table.controls}}
    means = {name: np.nanmean(table.get(model, place.variant, place.split, metric)) for name, model in models.items()}
    return f"positive control failed: {', '.join(f'{name} scores {mean:.2f}' for name, mean in means.items())}"


def _kept(found: Scored, unscored: int) -> tuple[Interval, Floats]:
    """Return the knowledge kept with its bounds, and its resamples.

    What a model says of placebos in the places of the truths is what luck would give it: bounds leave out as much of it
    as luck explains in 1 of 20 draws. Facts without placebos are resampled with replacement, as a sample of others.
    The upper bound takes nothing off for truths that lie below what controls or placebos have: they make up for none
    that are known.
    """
    rows, raw = found.scored & found.relative, found.scored & ~found.relative
    counts_BF = resampled_counts(int(raw.sum()))
    luck_B, total, o_R = _luck(found.luck_FC[rows], len(counts_BF)), found.gap_o[rows].sum(), found.gap_o[raw]
    with np.errstate(divide="ignore", invalid="ignore"):
        resamples, most = (
            (gaps_F[rows].sum() - luck_B + counts_BF @ gaps_F[raw]) / (total + counts_BF @ o_R)
            for gaps_F in (found.gap_s, np.maximum(found.gap_s, 0))
        )
        value = (found.gap_s[rows].sum() + found.gap_s[raw].sum()) / (total + o_R.sum())
    high = float("inf") if unscored else bounds(most, LEVEL)[1]
    return Interval(float(value), bounds(resamples, LEVEL)[0], high, int(rows.sum() + raw.sum()) + unscored), resamples


def _luck(luck_FC: Floats, draws: int) -> Floats:
    """Return the sum over facts of what a random placebo of each would have in the truth's place, [draws]."""
    generator, total_B = np.random.default_rng(0), np.zeros(draws)
    for luck_C in luck_FC:
        known = luck_C[~np.isnan(luck_C)]
        total_B += known[generator.integers(0, len(known), draws)]
    return total_B


def is_known(s: Floats, c: Floats, o: Floats) -> Flags:
    """Tell of each fact whether it counts as known: more than half-way from the control's score to the original's, or
    to 1 where the original does not show it beyond the control: it may have been hidden there."""
    return s - c > KNOWN_SHARE * np.where(o - c > MIN_GAP, o - c, 1.0)
