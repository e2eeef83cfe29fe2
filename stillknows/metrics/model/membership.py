"""How well attacks tell the texts that were to be forgotten from texts that the original was never trained on."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import numpy as np

from stillknows.errors import NotMeasured, UserError, did_you_mean
from stillknows.registry import Bound, bind, plugins, register
from stillknows.scoring import drop_unscored, observed, score
from stillknows.specs import alternatives, chained, parse
from stillknows.stats import (
    auc,
    bootstrap_counts,
    interval,
    resampled_auc,
    resampled_top_auc,
    resampled_tpr_at_fpr,
    tpr_at_fpr,
)
from stillknows.types import Floats, Interval, Observations

FPR = 0.01
TOP = 0.1


@register(
    "metric", role="model", source="arXiv 2112.03570 (TPR at low FPR); attacks: see the metrics", reads=("log_probs",)
)
def membership(
    subject: Mapping[str, Observations],
    control: Mapping[str, Observations] | None,
    *,
    attacks: str = "",
    members: str = "privleak_forget",
    holdouts: str = "privleak_holdout",
) -> dict[str, Interval]:
    """AUC, true positive rate at 1 % false positives and worst decile of every membership attack: 0..1.

    Higher gives more away. Returns for each attack, by its name:
        <attack>.auc: P(a member scores higher than a holdout text); chance is ½, and less than ½ gives membership away
            as well.
        <attack>.tpr_at_1%_fpr: share of members above the lowest threshold that at most 1 % of the m holdout texts
            exceed, none if m < 100; chance is (1 + ⌊m/100⌋)/(1 + m), .0198 for 100.
        <attack>.worst_decile: the AUC of the tenth of members with the highest scores alone: what an average hides when
            few texts are remembered. 1: they all score above every holdout text.
        <attack>.worst_decile_chance: what that is for members and holdouts drawn alike, 1 − (t + 1)/(2(n + 1)) with the
            t = ⌈n/10⌉ highest of n members; .945 for 100.

    Bounds resample members and holdout texts separately.

    Args:
        attacks: names of membership metrics joined by "+"; empty: all whose fields were observed.
        members: name of the split of texts that were to be forgotten.
        holdouts: name of the split of texts that the original was never trained on.
    """
    for name in (members, holdouts):
        observed(subject, name)
    figures: dict[str, Interval] = {}
    reasons: list[str] = []
    for attack in _attacks(attacks):
        try:
            figures |= _judge(attack, subject, control or {}, members, holdouts)
        except NotMeasured as reason:
            if attacks:
                raise
            reasons.append(f"{attack.plugin.name}: {reason}")
    if not figures:
        raise NotMeasured("; ".join(reasons))
    return figures


def _attacks(names: str) -> list[Bound]:
    known = [name for name, plugin in plugins("metric", "example").items() if plugin.measures == "membership"]
    chosen = [call for part in alternatives(names) for call in chained(part)] if names else known
    for name in (parse(spec).name for spec in chosen):
        if name not in known:
            raise UserError(
                f"no membership metric named {name!r}{did_you_mean(name, known)}", "stillknows list metrics"
            )
    return [bind("metric", spec) for spec in chosen]


def _judge(
    attack: Bound,
    subject: Mapping[str, Observations],
    control: Mapping[str, Observations],
    members: str,
    holdouts: str,
) -> dict[str, Interval]:
    (positive, units), (negative, other_units) = (
        drop_unscored(score(attack, subject[name], control.get(name)), subject[name].facts, name)
        for name in (members, holdouts)
    )
    pair, drawn = (positive, negative), (bootstrap_counts(units), bootstrap_counts(other_units, seed=1))
    n, top = len(positive), ceil(TOP * len(positive))
    highest: Floats = np.sort(positive)[n - top :]
    chance = 1 - (top + 1) / (2 * (n + 1))
    num_units = len(set(units)) + len(set(other_units))
    name = attack.plugin.name
    return {
        f"{name}.auc": interval(auc(*pair), resampled_auc(*pair, *drawn), num_units),
        f"{name}.tpr_at_1%_fpr": interval(tpr_at_fpr(*pair, FPR), resampled_tpr_at_fpr(*pair, *drawn, FPR), num_units),
        f"{name}.worst_decile": interval(auc(highest, negative), resampled_top_auc(*pair, *drawn, TOP), num_units),
        f"{name}.worst_decile_chance": Interval(chance, chance, chance, n),
    }
