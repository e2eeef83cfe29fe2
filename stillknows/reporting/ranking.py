"""How far metrics can be trusted, from observations of models whose knowledge is known. No model is needed here.

After OpenUnlearning (arXiv 2506.12618, section 4), with its pools, filters and harmonic means. Two formulas differ: its
ratios of scores punish a metric that starts at exactly 0, however little it rises, and spare one that never comes near
0. A rise is measured against the distance between the pools instead (see `resistance`); the published ratios are
computed beside it. Letters: B resamples with the observed data as row 0, M models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillknows.errors import NotMeasured
from stillknows.formatting import markdown_table, number
from stillknows.registry import Bound, bind
from stillknows.reporting.tables import bounds_words
from stillknows.scoring import score
from stillknows.stats import bootstrap_counts, interval, resampled_auc, resampled_mean
from stillknows.types import CONTROL, FULL, Floats, Interval, Observations

RELEARNED = "relearned"  # the state of a model after some of the facts were taught again
LEAST_UTILITY = 0.8  # of the retain score before unlearning: models below it are left out, as in the paper
FIELDS_OF_ANY_QUESTION = frozenset(
    {"log_probs", "hits", "ends", "answers", "generations"}
)  # observed on every benchmark
PARTS = ("faithfulness", "quantization", "relearning", "aggregate")
Seen = Mapping[tuple[str, str, str], Observations]  # (model, state, split); a state is FULL, a format or RELEARNED


@dataclass(frozen=True)
class Trial:
    """What metrics are judged by.

    taught, untaught: the pools, models that were and were not taught the facts of the split "forget".
    unlearned: models made from taught ones, with the name of the one that each was made from.
    formats: what the unlearned models and the control were quantized to.
    measured: [N] which items of "forget" were not relearned; the others are left out where relearning is judged.
    seen: all models' observations of "forget", of "holdout" (facts of the same form that no model was taught) and of
        "retain", as they are (FULL); the unlearned models' and the never-taught CONTROL's in every other state as well.
    """

    taught: tuple[str, ...]
    untaught: tuple[str, ...]
    unlearned: Mapping[str, str]
    formats: tuple[str, ...]
    measured: NDArray[np.bool_]
    seen: Seen

    def knowledge(self, metric: Bound, model: str, state: str = FULL, *, measured_only: bool = False) -> Floats:
        """Return a model's score in every resample of the facts, [B]: the mean over "forget", or for a membership score
        the AUC of "forget" against "holdout".

        Raises NotMeasured when no item can be judged.
        """
        values, drawn = self._scored(metric, model, state, "forget", measured_only=measured_only)
        with np.errstate(invalid="ignore"):  # a resample without any of the items has no score
            if metric.plugin.measures == "knowledge":
                return resampled_mean(values, drawn)
            held, drawn_held = self._scored(metric, model, state, "holdout")
            return resampled_auc(values, held, drawn, drawn_held)

    def _scored(
        self, metric: Bound, model: str, state: str, split: str, *, measured_only: bool = False
    ) -> tuple[Floats, Floats]:
        """Return the scores [n] of the items that have a score and how often each is drawn, [B, n]."""
        seen = self.seen[model, state, split]
        values = score(metric, seen, self.seen[CONTROL, state, split])
        kept = ~np.isnan(values) & (self.measured if measured_only else True)
        if not kept.any():
            raise NotMeasured(f"no item of the split {split!r} can be judged for {model}")
        return values[kept], with_all(seen.facts, seed=int(split == "holdout"))[:, kept]

    def pool(self, metric: Bound, models: Sequence[str], state: str = FULL, *, measured_only: bool = False) -> Floats:
        """Return the models' scores as columns, [B, M]."""
        scores = [self.knowledge(metric, model, state, measured_only=measured_only) for model in models]
        return np.stack(scores, axis=1)

    def probability(self, model: str, split: str, state: str = FULL) -> float:
        """Return the mean answer probability on a split, 0..1."""
        return float(score(bind("metric", "answer_probability"), self.seen[model, state, split]).mean())

    def utility(self, model: str) -> float:
        """Return an unlearned model's retain score as a share of the one before unlearning."""
        return self.probability(model, "retain") / self.probability(self.unlearned[model], "retain")


def with_all(units: Sequence[str], seed: int) -> Floats:
    """Return a first row that draws every unit once, with the resamples of the units below it: [B, n]."""
    drawn = bootstrap_counts(units, seed)
    return np.vstack([np.ones((1, drawn.shape[1])), drawn])


def pool_auc(taught: Floats, untaught: Floats, drawn: Floats, drawn_untaught: Floats) -> Floats:
    """Return P(taught > untaught) + ½·P(equal) in every resample, [B], 0..1: the paper's faithfulness; ½ is chance.

    The models' scores [B, M] and [B, K] come with how often each model is drawn, of the same shapes.
    """
    column, row = taught[:, :, None], untaught[:, None, :]
    won = (column > row) + (column == row) / 2
    return np.einsum("bm,bmk,bk->b", drawn, won, drawn_untaught) / (drawn.sum(1) * drawn_untaught.sum(1))


def best_threshold(taught: Floats, untaught: Floats) -> float:
    """Return the threshold with the best balanced accuracy, of the midpoints between neighbouring scores; ties take the
    lowest. Models above it count as taught. Where all scores are equal, it is that score."""
    scores = np.unique(np.concatenate([taught, untaught]))
    candidates = (scores[1:] + scores[:-1]) / 2 if len(scores) > 1 else scores
    accuracy = [(taught > t).mean() + (untaught <= t).mean() for t in candidates]
    return float(candidates[int(np.argmax(accuracy))])


def resistance(rise: Floats, gap: Floats) -> Floats:
    """Return 1 − rise/gap, held within 0..1: 1, the score did not rise; 0, by as much as knowing the facts adds to it.

    rise: [B, M], what an intervention adds to a score, beyond what it adds to a never-taught model's where it teaches.
    gap: [B], mean score of the taught models minus that of the untaught; NaN is returned where it is not positive.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(gap > 0, rise.T / gap, np.nan).T
    return 1 - np.clip(share, 0, 1)


def published_quantization(before: Floats, after: Floats) -> Floats:
    """Return OpenUnlearning's Q of each model, min(before/after, 1): 0..1, 1 where the score does not rise.

    The paper prints after/before, which would reward the rise that its section 4.2 speaks against.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(after > before, before / after, 1.0)


def published_relearning(rise: Floats, control: float) -> Floats:
    """Return OpenUnlearning's R of each model, min(the never-taught control's rise/the model's rise, 1): 0..1.

    1 where the model's score does not rise, 0 where it does and the control's does not.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(rise > 0, np.clip(control / rise, 0, 1), 1.0)


def aggregate(faithfulness: Any, quantization: Any, relearning: Any) -> Any:
    """Return HM(faithfulness, HM(quantization, relearning)) of numbers or arrays in 0..1, HM the harmonic mean of two.

    0 as soon as one of them is 0, NaN where one is (scipy's hmean is slow on arrays with NaN).
    """
    with np.errstate(divide="ignore"):
        inverse = np.divide(1, [faithfulness, faithfulness, quantization, relearning])
    return 1 / inverse.mean(axis=0)


def judge(trial: Trial, metric: Bound) -> dict[str, Any]:
    """Return what a metric is worth.

    "faithfulness", "quantization", "relearning" and "aggregate" = HM(faithfulness, HM(quantization, relearning)), each
    0..1 as an Interval or as the reason why it was not measured; "published", the aggregate with OpenUnlearning's
    ratios, a number or None. HM is the harmonic mean. Bounds come from resampling facts, and models within their group;
    the threshold is held.
    """
    found: dict[str, Any] = {}
    try:
        taught, untaught = trial.pool(metric, trial.taught), trial.pool(metric, trial.untaught)
        drawn, drawn_untaught = with_all(trial.taught, 2), with_all(trial.untaught, 3)
        faithful = pool_auc(taught, untaught, drawn, drawn_untaught)
        found["faithfulness"] = _interval(faithful, len(trial.taught) + len(trial.untaught))
        gap = _mean(taught, drawn) - _mean(untaught, drawn_untaught)
        if not gap[0] > 0:
            raise NotMeasured("models that know score no higher on average than models that do not")
        taken = _taken_for_unlearned(trial, metric, best_threshold(taught[0], untaught[0]))
        found |= _robustness(trial, metric, taken, gap, faithful)
    except NotMeasured as reason:
        found = dict.fromkeys(PARTS, str(reason)) | {"published": None} | found
    return found


def _taken_for_unlearned(trial: Trial, metric: Bound, threshold: float) -> list[str]:
    """Return the unlearned models that are still useful and score at most the threshold."""
    useful = [model for model in trial.unlearned if trial.utility(model) >= LEAST_UTILITY]
    taken = [model for model in useful if trial.knowledge(metric, model)[0] <= threshold]
    if not taken:
        raise NotMeasured(
            f"it takes none of the {len(useful)} unlearned models that are still useful for unlearned: all score above "
            f"{threshold:.3g}"
        )
    return taken


def _robustness(
    trial: Trial, metric: Bound, models: Sequence[str], gap: Floats, faithful: Floats
) -> dict[str, Interval | float]:
    drawn = with_all(models, 4)
    before = trial.pool(metric, models)
    quantized = [trial.pool(metric, models, state) for state in trial.formats]
    quantization = np.mean([_mean(resistance(after - before, gap), drawn) for after in quantized], axis=0)
    start = trial.pool(metric, [*models, CONTROL], measured_only=True)
    rise = trial.pool(metric, [*models, CONTROL], RELEARNED, measured_only=True) - start
    relearning = _mean(resistance(rise[:, :-1] - rise[:, -1:], gap), drawn)
    q = np.mean([published_quantization(before[0], after[0]) for after in quantized])
    r = np.mean(published_relearning(rise[0, :-1], rise[0, -1]))
    return {
        "quantization": _interval(quantization, len(models)),
        "relearning": _interval(relearning, len(models)),
        "aggregate": _interval(aggregate(faithful, quantization, relearning), len(models)),
        "published": float(aggregate(faithful[0], q, r)),
    }


def _mean(scores: Floats, drawn: Floats) -> Floats:
    """Return the mean over the drawn models in every resample, [B]."""
    return (scores * drawn).sum(1) / drawn.sum(1)


def _interval(resamples: Floats, n: int) -> Interval:
    return interval(float(resamples[0]), resamples[1:], n)


def rank(trial: Trial, metrics: Mapping[str, Bound], gates: Sequence[str]) -> list[dict[str, Any]]:
    """Return one JSON-able row per metric, the highest aggregate first and what was not measured last.

    Equal aggregates share a rank; `reads` are the fields of Observations that a metric reads.
    """
    rows = []
    for name, metric in metrics.items():
        row = {"name": name, "measures": metric.plugin.measures, "reads": sorted(metric.plugin.fields)}
        found = judge(trial, metric)
        parts = {part: _json(found[part]) for part in PARTS}
        rows.append(row | {"gate": name in gates} | parts | {"published": found["published"]})
    values = [row["aggregate"].get("value", -1.0) for row in rows]
    for row, value in zip(rows, values, strict=True):
        row["rank"] = None if value < 0 else 1 + sum(other > value for other in values)
    return sorted(rows, key=lambda row: (-row["aggregate"].get("value", -1.0), row["name"]))


def _json(result: Interval | str) -> dict[str, Any]:
    return {"not_measured": result} if isinstance(result, str) else result._asdict()


def objections(rows: Sequence[Mapping[str, Any]], gates: Sequence[str]) -> list[str]:
    """Return what the rows of `rank` say against these gates; nothing where they support them.

    They do when each gate's aggregate is at least the lower bound of the best metric's among those that can be had of
    any question with one true answer, and when no two gates read the same field of Observations, so that each sees
    something of its own.
    """
    known = {row["name"]: row for row in rows}
    judged = {name: row["aggregate"] for name, row in known.items() if "value" in row["aggregate"]}
    found = [f"{gate} was not judged" for gate in gates if gate not in judged]
    anywhere = [name for name in judged if FIELDS_OF_ANY_QUESTION.issuperset(known[name]["reads"])]
    best = max(anywhere, key=lambda name: judged[name]["value"], default="")
    for gate in gates:
        if gate in judged and best and judged[gate]["value"] < judged[best]["low"]:
            value, bounds = number(judged[gate]["value"]), bounds_words(judged[best]["low"], judged[best]["high"])
            found.append(f"{gate} has the aggregate {value}, below the bounds of the best, {best} ({bounds})")
    for i, gate in enumerate(gates):
        for other in gates[:i]:
            shared = set(known[gate]["reads"]) & set(known[other]["reads"]) if {gate, other} <= known.keys() else ()
            if shared:
                found.append(f"{other} and {gate} both read {', '.join(sorted(shared))}")
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `rank` as a Markdown table, with reasons for what was not measured below it."""
    reasons = {row[part]["not_measured"]: None for row in rows for part in PARTS if "not_measured" in row[part]}
    notes = {reason: i for i, reason in enumerate(reasons, 1)}
    lines = []
    for row in rows:
        words = [_words(row[part], notes) for part in PARTS]
        place, published = str(row["rank"] or "–"), number(row["published"], "–")
        lines.append([place, f"`{row['name']}`", row["measures"], *words, published, "yes" if row["gate"] else ""])
    header = ["rank", "metric", "measures", *PARTS, "as published", "gate"]
    return "\n\n".join([markdown_table(header, lines), *(f"[{i}] {reason}" for reason, i in notes.items())])


def _words(part: dict[str, Any], notes: Mapping[str, int]) -> str:
    if "value" not in part:
        return f"not measured [{notes[part['not_measured']]}]"
    return f"{number(part['value'])} ({bounds_words(part['low'], part['high'])})"
