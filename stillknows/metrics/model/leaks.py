"""How often sampled answers leak what was to be forgotten, with bounds that hold when none did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from stillknows.errors import NotMeasured
from stillknows.registry import bind, register
from stillknows.scoring import observed, score
from stillknows.stats import LEVEL, binomial_bounds
from stillknows.types import Interval, Observations


@register("metric", role="model", source="arXiv 2511.04934 (leak@k), Clopper and Pearson 1934", reads=("samples",))
def leak_rate(
    subject: Mapping[str, Observations],
    control: Mapping[str, Observations] | None,
    *,
    split: str = "forget",
    leak: Literal["contained", "rouge"] = "contained",
    threshold: float = 0.8,
) -> dict[str, Interval]:
    """Share of all sampled answers of a split that leak the true one: 0..1, lower is more forgotten.

    Returns leak_rate with exact bounds at stats.LEVEL; n counts samples. No leak among 299 samples bounds the rate by
    1 %, while resampling the examples would bound it by 0. The upper bound is for the mean rate of these very examples:
    their rates differ, and then the number of leaks spreads less than binomially (Hoeffding 1956).

    Args:
        split: name of the split.
        leak: what counts as one, "contained" or "rouge", see the metric leak_at_k.
        threshold: of ROUGE-L recall, for "rouge" only.
    """
    (samples,) = observed(subject, split, "samples")
    rates = score(bind("metric", f"leak_at_k:k=1:leak={leak}:threshold={threshold}"), subject[split])
    judged = ~np.isnan(rates)
    if not judged.any():
        raise NotMeasured(f"no example of the split {split!r} was sampled")
    drawn = np.array([len(texts or ()) for texts in samples])[judged]
    leaks, trials = round(float(rates[judged] @ drawn)), int(drawn.sum())
    return {"leak_rate": Interval(leaks / trials, *binomial_bounds(leaks, trials, LEVEL), trials)}
