"""What a subject keeps of what is to be kept: on average, and item by item.

Letters: s, o are a fact's score under the subject and the original, in the same variant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from stillknows.auditing.evidence import CellKey, Table, share, unscored
from stillknows.auditing.knowledge import no_score
from stillknows.auditing.policy import Policy
from stillknows.stats import LEVEL, binomial_bounds
from stillknows.types import ORIGINAL, Finding, Outcome

KEPT_ROLES = ("retain", "neighbour")
KNOWN = 0.2  # what the original scores on a fact that it clearly knows, at least
LOST = 0.5  # part of the original's score below which a fact is lost
LEAST_KNOWN = 10  # facts that the original knows, with fewer of which a split proves nothing
LOST_IS_DAMAGE = 0.05  # share of lost facts that excludes that a model works as before
LOST_IS_OPEN = 0.2  # share that must be excluded


def damage(table: Table, subject: str, variant: str, policy: Policy) -> Iterator[Finding]:
    """Yield what one variant keeps of the retain and neighbour splits."""
    places = [CellKey(subject, variant, split) for split, role in table.roles.items() if role in KEPT_ROLES]
    if not any(table.roles[place.split] == "retain" for place in places):
        why = "there is no retain split"
        yield Finding("utility_not_measured", "undecided", variant, metric=policy.utility, detail=why)
    for place in places:
        average = list(_on_average(table, place, policy))
        yield from average
        if any(finding.kind == "utility_not_measured" for finding in average):
            continue
        for metric in dict.fromkeys((policy.utility, *policy.gates)):
            if (place, metric) in table.scores:
                yield from _item_by_item(table, place, metric, required=metric == policy.utility)


def _on_average(table: Table, place: CellKey, policy: Policy) -> Iterator[Finding]:
    metric, floor = policy.utility, policy.utility_floor
    yield from no_score(table, (place.model, ORIGINAL), place, metric)
    kept = share(table, place, metric)
    where: dict[str, Any] = {"variant": place.variant, "split": place.split, "metric": metric}
    if isinstance(kept, str):
        yield Finding("utility_not_measured", "undecided", **where, detail=kept)
        return
    outcome: Outcome = "damage" if kept.high < floor else "undecided" if kept.low < floor else "pass"
    yield Finding("utility", outcome, **where, **kept._asdict(), threshold=floor)


def _item_by_item(table: Table, place: CellKey, metric: str, *, required: bool) -> Iterator[Finding]:
    """Yield how many of the facts that the original knows are lost.

    A split on which it knows few, or of which all answers are the same, proves nothing: where `required`, that is no
    pass.
    """
    where: dict[str, Any] = {"variant": place.variant, "split": place.split, "metric": metric}
    o, s = (table.get(model, place.variant, place.split, metric) for model in (ORIGINAL, place.model))
    known = np.nan_to_num(o) > KNOWN
    n, lost = int(known.sum()), int((~(s[known] >= LOST * o[known])).sum())
    why = ""
    if n < LEAST_KNOWN:
        why = f"the original knows {n} of its facts, of the {LEAST_KNOWN} that it takes"
    elif table.answers.get(place.split, n) == 1:
        why = "all its answers are the same"
    if why and required:
        yield Finding("split_proves_nothing", "undecided", **where, detail=why)
    if n < LEAST_KNOWN:
        return
    low, high = binomial_bounds(lost, n, LEVEL)
    outcome: Outcome = "pass" if high <= LOST_IS_OPEN or not lost else "undecided"
    if low > LOST_IS_DAMAGE and not unscored(table, (place.model, ORIGINAL), place, metric):
        outcome = "damage"
    threshold = LOST_IS_OPEN if outcome == "undecided" else LOST_IS_DAMAGE
    yield Finding("items_lost", outcome, **where, value=lost / n, low=low, high=high, threshold=threshold, n=n)
