"""From observations to one score per example: hands a metric what it needs, or says why that is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stillknows.errors import NotMeasured, UserError
from stillknows.registry import Bound
from stillknows.types import Floats, Observations

ROUNDING = 1e-6  # by which a share may be above 1


def score(metric: Bound, seen: Observations, reference: Observations | None = None) -> Floats:
    """Return the metric's score of every example, [N], NaN where it cannot judge one.

    A parameter named after a field of Observations is given that field of `seen`, one named `reference_<field>` the
    field of `reference`: the control's observations under the same variant and on the same split. An example whose
    probabilities are not numbers has no score, whatever the metric reads. Raises NotMeasured when a field was not
    observed, or when the reference is missing or of other examples; UserError for scores that are not one number for
    each example, and for knowledge outside 0..1.
    """
    inputs = {}
    for name in metric.plugin.needs:
        field = name.removeprefix("reference_")
        if field != name and (reference is None or reference.ids != seen.ids):
            raise NotMeasured("there is no control with the same examples")
        value = getattr(seen if field == name else reference, field)
        if value is None:
            raise NotMeasured(f"{field} were not observed")
        inputs[name] = _fixed(value)
    scores, rows = _checked(metric, metric(**inputs), len(seen.ids)), seen.log_probs or ()
    if not rows or not np.isnan(np.concatenate(rows)).any():
        return scores
    return np.where([bool(np.isnan(row).any()) for row in rows], np.nan, scores)


def _fixed(value: Any) -> Any:
    """Return a field whose arrays cannot be written: the next metric reads them too."""
    if isinstance(value, tuple):
        return tuple(map(_fixed, value))
    if isinstance(value, np.ndarray):
        value = value.view()
        value.flags.writeable = False
    return value


def _checked(metric: Bound, given: Any, count: int) -> Floats:
    """Return what a metric gave as scores."""
    try:
        scores = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        scores = np.array(np.nan)
    if scores.shape != (count,):
        raise UserError(
            f"the metric {metric.spec} does not give one number for each of {count} examples", "mend the metric"
        )
    if metric.plugin.measures == "knowledge" and bool((np.abs(scores - 0.5) > 0.5 + ROUNDING).any()):
        raise UserError(
            f"the metric {metric.spec} gives knowledge outside 0..1",
            'mend it, or register it as another: measures="behaviour"',
        )
    return scores


def observed(splits: Mapping[str, Observations], name: str, *fields: str) -> list[Any]:
    """Return fields of a split's observations; NotMeasured when it, or one of them, was not observed."""
    if name not in splits:
        raise NotMeasured(f"the split {name!r} was not measured")
    values = [getattr(splits[name], field) for field in fields]
    missing = [field for field, value in zip(fields, values, strict=True) if value is None]
    if missing:
        raise NotMeasured(f"{', '.join(missing)} were not observed on the split {name!r}")
    return values


def drop_unscored(scores: Floats, facts: Sequence[str], name: str) -> tuple[Floats, list[str]]:
    """Return the scores that are not NaN with their facts; NotMeasured when the split `name` has none."""
    kept = ~np.isnan(scores)
    if not kept.any():
        raise NotMeasured(f"no example of the split {name!r} could be judged")
    return scores[kept], [fact for fact, keep in zip(facts, kept, strict=True) if keep]
