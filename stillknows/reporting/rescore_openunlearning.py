"""Scores of OpenUnlearning's logs, from their items, beside the log's own numbers.

Losses and texts of items are scored as everywhere. Where an item holds a mere score (extraction strength, attacks) it
is averaged or ranked, since the log does not hold what it was made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stillknows.errors import NotMeasured, UserError
from stillknows.likelihood import mean_log_probs, normalised_probability, truth_ratio
from stillknows.registry import bind
from stillknows.reporting.log_values import read_text
from stillknows.reporting.logs_openunlearning import SPLITS, Log, attack, read, splits
from stillknows.reporting.scored import (
    EXACT,
    SINGLE,
    Agreement,
    Json,
    as_json,
    compare,
    compare_one,
    measured,
    not_measured,
    told,
)
from stillknows.scoring import drop_unscored, observed, score
from stillknows.stats import auc, bootstrap_counts, interval, mean_interval, resampled_auc
from stillknows.types import Floats, Interval, Observations

TRUTH_RATIO = re.compile(r"(forget|retain|ra|wf)_truth_ratio", re.IGNORECASE)
NORMALISED = re.compile(r"(forget|retain|ra|wf)_Q_A_Prob_normalised")
ROUGE = {
    "rougeL_recall": "rouge_l:score=recall:stemmer=true",
    "rougeL_f1": "rouge_l:score=fmeasure:stemmer=true",
    "rouge1_recall": "rouge_1:score=recall:stemmer=true",
}
MUSE_ROUGE = "rouge_l:score=fmeasure:stemmer=false"
ATTACK, REFERENCE_AUC = "mia_min_k", 0.5  # PrivLeak is that of this attack; without a retrained model against this AUC


def rescore_openunlearning(path: Path, reference: Path | None = None) -> Json:
    """Score a log of OpenUnlearning, under its own names and in its units (shares 0..1; privleak in percent).

    Returns `values` with bounds or the reason why one was not measured, `n` of items by metric, `recorded`: how the
    log's own numbers compare, `warnings` where they disagree or items are null, and `notes`: where definitions differ.

    Args:
        reference: log of the retrained model, for forget_quality and privleak.
    """
    log = read(path)
    known = None if reference is None else read(reference)
    seen, control = splits(log), None if known is None else splits(known)
    if control is not None:
        _check_items(log, seen, known, control)
    parts = [_Part(log, name, seen) for name in log.metrics]
    values = {part.name: part.value() for part in parts}
    values |= _figures(log, known, seen, control)
    compared = [agreement for part in parts for agreement in part.agreements()]
    compared += [
        compare_one(name, values[name]["value"], recorded, SINGLE)
        for name, table in log.tables.items()
        if (recorded := table.aggregate) is not None and values.get(name, {}).get("value") is not None
    ]
    result = {"format": "openunlearning", "file": str(log.file), "values": values, **told(compared)}
    result["n"] = {name: len(table.items) for name, table in log.tables.items() if table.items}
    result["warnings"] += _nulls(log)
    result["notes"] = list(_notes(log, values, known))
    return result


def _check_items(log: Log, seen: Mapping, known: Log | None, control: Mapping) -> None:
    if known is not None and "forget" in seen and "forget" in control:
        odd = set(seen["forget"].ids) ^ set(control["forget"].ids)
        if odd:
            raise UserError(
                f"{log.file} and {known.file} are not of the same forget items, such as item {min(odd)}",
                "give the log of the retrained model on the same forget split",
            )


@dataclass(frozen=True)
class _Part:
    """One metric of a log, scored from its own items or from those of its split."""

    log: Log
    name: str
    seen: Mapping[str, Observations]

    def value(self) -> Json:
        try:
            if f"{self.name}.forget" in self.log.tables:
                return as_json(_auc(**attack(self.log, self.name)))
            scores, ids = drop_unscored(*self._scores(), self.name)
        except NotMeasured as reason:
            return not_measured(reason)
        return as_json(mean_interval(scores, ids))

    def _scores(self) -> tuple[Floats, tuple[str, ...]]:
        """Return one score per item, NaN where the log holds null, with the items."""
        if match := TRUTH_RATIO.fullmatch(self.name):
            prefix = match[1].lower()
            ratios, ids = self.ratios(prefix)
            with np.errstate(divide="ignore"):
                return np.minimum(ratios, 1 / ratios) if prefix == "forget" else np.maximum(0, 1 - ratios), ids
        if match := NORMALISED.fullmatch(self.name):
            true, wrong, ids = observed(self.seen, SPLITS[match[1]], "log_probs", "wrong_log_probs", "ids")
            return normalised_probability(true, wrong), ids
        table = self.log.tables[self.name]
        if table.holds("avg_loss"):
            return self._mean(lambda row: np.exp(-row), "avg_loss")
        if table.holds("generation"):
            return self._rouge("rougeL_f1" if "mem_ROUGE" in self.name else "rougeL_recall")
        for key in ("score", "prob"):
            if table.holds(key):
                return self._mean(lambda row: row, key)
        raise NotMeasured(
            "the log holds no items of it" if not table.items else "its items hold no score that is known"
        )

    def ratios(self, prefix: str) -> tuple[Floats, tuple[str, ...]]:
        fields = ("log_probs", "paraphrase_log_probs", "wrong_log_probs", "ids")
        *choices, ids = observed(self.seen, SPLITS[prefix], *fields)
        return truth_ratio(*choices), ids

    def _mean(self, of: Callable[[Floats], Floats], key: str) -> tuple[Floats, tuple[str, ...]]:
        column = self.log.column(self.name, key)
        return np.array([np.nan if row is None else of(np.array(row)).mean() for row in column.values()]), (*column,)

    def _rouge(self, key: str) -> tuple[Floats, tuple[str, ...]]:
        """Return ROUGE, a mean where an item has several answers."""
        return rouge(self.log, self.name, ROUGE[key]), tuple(self.log.tables[self.name].items)

    def agreements(self) -> Iterator[Agreement]:
        """Compare what is recorded of each item with what is computed from its losses and texts."""
        table = self.log.tables[self.name]
        if match := TRUTH_RATIO.fullmatch(self.name):
            if table.holds("score") and SPLITS[match[1].lower()] in self.seen:
                yield from self._agreement("score", lambda: self.ratios(match[1].lower()), SINGLE)
        elif table.holds("avg_loss") and table.holds("prob"):
            yield from self._agreement("prob", lambda: self._mean(lambda row: np.exp(-row), "avg_loss"), SINGLE)
        elif table.holds("generation"):
            for key in ROUGE:
                if table.holds(key):
                    yield from self._agreement(key, lambda key=key: self._rouge(key), EXACT)

    def _agreement(self, key: str, scores: Callable[[], tuple], tolerance: float) -> Iterator[Agreement]:
        try:
            computed, ids = scores()
        except NotMeasured:
            return
        theirs, known = self._mean(lambda row: row, key)
        recorded = dict(zip(known, theirs, strict=True))
        kept = [(ours, recorded[i]) for i, ours in zip(ids, computed, strict=True) if i in recorded]
        pairs = np.array([pair for pair in kept if not np.isnan(pair).any()])
        if pairs.size:
            yield compare(f"{self.name}.{key}", pairs[:, 0], pairs[:, 1], tolerance)


def rouge(log: Log, name: str, spec: str) -> Floats:
    """Return each item's ROUGE, NaN where the log holds null."""
    texts, truths = (log.column(name, key, read_text) for key in ("generation", "ground_truth"))
    pairs = [_pairs(f"{log.file}, {name!r}: item {i}", texts[i], truths[i]) for i in texts]
    flat = [pair for row in pairs for pair in row]
    ids = tuple(str(i) for i in range(len(flat)))
    said, true = (tuple(column) for column in zip(*flat, strict=True))
    seen = Observations(ids, ids, ids, true, generations=said)
    scores = iter(score(bind("metric", spec), seen))
    return np.array([float(np.mean([next(scores) for _ in row])) for row in pairs])


def _pairs(where: str, texts: tuple | None, truths: tuple | None) -> list[tuple[str | None, str]]:
    if texts is None or truths is None:
        return [(None, "")]
    if len(texts) != len(truths):
        raise UserError(f"{where} has {len(texts)} generations and {len(truths)} answers")
    return list(zip(texts, truths, strict=True))


def _auc(forget: Observations, holdout: Observations) -> Interval:
    """P(a forget item is taken for a member rather than a holdout item): 0..1, as OpenUnlearning and unlike MUSE."""
    members, others = (mean_log_probs(seen.log_probs or ()) for seen in (forget, holdout))
    drawn = bootstrap_counts(forget.facts), bootstrap_counts(holdout.facts, seed=1)
    n = len(forget.ids) + len(holdout.ids)
    return interval(auc(members, others), resampled_auc(members, others, *drawn), n)


def _figures(log: Log, known: Log | None, seen: Mapping[str, Observations], control: Mapping | None) -> Json:
    """Return the numbers that are made of several splits or of a second model, where the log has them."""
    values: Json = {}
    if "model_utility" in log.tables or seen.keys() > {"forget"}:
        values["model_utility"] = measured("model_utility", seen, None)["model_utility"]
    if "forget_quality" in log.tables or ("forget" in seen and known is not None):
        values |= measured("forget_quality", seen, control)
    if f"{ATTACK}.forget" in log.tables:
        values["privleak"] = _privleak(log, known)
    return values


def _privleak(log: Log, known: Log | None) -> Json:
    spec = "privleak:members=forget:holdouts=holdout"
    try:
        sides = attack(log, ATTACK)
        if known is None:
            return measured(f"{spec}:auc_retrain={REFERENCE_AUC}", sides, None)["privleak"]
        if f"{ATTACK}.forget" not in known.tables:
            raise NotMeasured(f"{known.file} has no {ATTACK}")
        return measured(spec, sides, attack(known, ATTACK))["privleak"]
    except NotMeasured as reason:
        return not_measured(reason)


def _nulls(log: Log) -> Iterator[str]:
    for name, table in log.tables.items():
        if table.null:
            yield f"{name}: {len(table.null)} of {len(table.items)} items hold null and are left out"


def _notes(log: Log, values: Json, known: Log | None) -> Iterator[str]:
    """Yield where a number is defined otherwise than here, or rests on what the log does not hold."""
    for name in log.tables:
        if "extraction_strength" in name:
            yield f"{name}: the items' own scores; 1/T, here 0, where not even the last of T tokens is reproduced"
        if "exact_memorization" in name:
            yield f"{name}: the items' own scores"
        if name == "mia_gradnorm":
            yield f"{name}: the mean over the matrices' norms with dropout; here the norm of the whole gradient"
        if "mem_ROUGE" in name and log.tables[name].holds("generation"):
            plain = float(np.nanmean(rouge(log, name, MUSE_ROUGE)))
            yield f"{name}: with stems; MUSE's own ROUGE has none and is {plain:.6g}"
    if "privleak" in values and known is None:
        yield (
            f"privleak: against an AUC of {REFERENCE_AUC:g}, as OpenUnlearning without a retrained model; "
            "give its log as `reference`"
        )
