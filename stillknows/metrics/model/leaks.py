"""How often sampled answers leak what was to be forgotten, with bounds that hold when none did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from stillknows.errors import NotMeasured
from stillknows.gate.membership import exposure as exposure_bits
from stillknows.likelihood import mean_log_probs
from stillknows.registry import bind, register
from stillknows.scoring import observed, score
from stillknows.stats import LEVEL, binomial_bounds, mean_interval
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


@register("metric", role="model", source="arXiv 1802.08232 (exposure)", reads=("log_probs", "placebo_log_probs"))
def exposure(
    subject: Mapping[str, Observations],
    control: Mapping[str, Observations] | None,
    *,
    split: str = "forget",
) -> dict[str, Interval]:
    """Mean exposure of the answers of a split as canaries, in bits: 0..log2(K + 1), lower is more forgotten.

    log2(K + 1) − log2(rank) of an answer among it and its K placebos, which were never inserted; by mean ln p per
    token, where the paper's canaries are all as long. Bounds resample facts.

    Returns exposure, and as negative control exposure.never_inserted, the same of each fact's first placebo among the
    others: what chance gives, about 1.44 bits less what few placebos take away.

    Args:
        split: name of the split; placebos of your own (`placebo_file`) make planted canaries of its answers.
    """
    log_probs, placebos, facts = observed(subject, split, "log_probs", "placebo_log_probs", "facts")
    rows = [mean_log_probs([own, *others]) for own, others in zip(log_probs, placebos, strict=True)]
    kept = [i for i, row in enumerate(rows) if len(row) > 2 and not np.isnan(row).any()]
    if not kept:
        raise NotMeasured(f"no example of the split {split!r} has two placebos")
    units = [facts[i] for i in kept]
    inserted, never = (
        np.array([exposure_bits(rows[i][first], rows[i][first + 1 :]) for i in kept]) for first in (0, 1)
    )
    return {"exposure": mean_interval(inserted, units), "exposure.never_inserted": mean_interval(never, units)}
