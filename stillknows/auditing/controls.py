"""Whether a never-taught control is one: it guesses on what is to be forgotten, and keeps what is to be retained.

Each control is tested by itself. What fails is left out of all comparisons: a control that was taught some of the facts
hides that others know them, and one that was not trained at all makes every trained model look as if it knew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from stillknows.auditing.comparing import compare, scored
from stillknows.auditing.evidence import CellKey, Table, share
from stillknows.auditing.fact_test import fact_test
from stillknows.auditing.policy import Policy
from stillknows.formatting import number
from stillknows.gate.candidates import Placebos
from stillknows.gate.placebo import PlaceboTest
from stillknows.stats import at_least
from stillknows.types import FULL, Observations

FALSE_ALARM = 0.005  # of each of two tests: how often at most a control that is one is dropped
LEAST_RETAINED = 0.5  # of the original's score on what is to be retained


def failing_controls(
    table: Table, observations: Mapping[CellKey, Observations], answers: Placebos | None, policy: Policy
) -> dict[str, str]:
    """Return the controls that are none, and why.

    One keeps less than half of the original's score on a retain split; or it knows facts to be forgotten: more of them
    than guesses explain are the likeliest of all their candidates and known by a gate, or truths rank above placebos by
    more than chance and it keeps more than the tolerance. An honest control is dropped in less than 1 % of audits.
    """
    alone = replace(table, controls=())
    found = {}
    for control in table.controls:
        why = _not_retained(table, control, policy) or (
            answers and _taught(alone, observations, control, answers, policy)
        )
        if why:
            found[control] = why
    return found


def _not_retained(table: Table, control: str, policy: Policy) -> str:
    for split in (split for split, role in table.roles.items() if role == "retain"):
        place = CellKey(control, FULL, split)
        kept = share(table, place, policy.utility) if (place, policy.utility) in table.scores else ""
        if not isinstance(kept, str) and kept.value < LEAST_RETAINED:
            return f"it keeps only {number(kept.value)} of the original's score on {split}"
    return ""


def _taught(
    alone: Table, observations: Mapping[CellKey, Observations], control: str, answers: Placebos, policy: Policy
) -> str:
    full = {place: seen for place, seen in observations.items() if place.variant == FULL}
    test = fact_test(full, control, alone.forget_splits, answers, controls=())
    if test is None:
        return ""
    first, p = _likeliest(test, _known(alone, control, policy))
    if p <= FALSE_ALARM:
        return f"it knows {first} of {len(test.facts)} facts to be forgotten, more than guesses explain (p = {p:.2g})"
    together, kept = test.diffuse, _most_kept(alone, control, policy)
    if together is not None and together.p <= FALSE_ALARM and kept > policy.tolerance:
        return f"it keeps {number(kept)} of the knowledge to be forgotten (p = {together.p:.2g})"
    return ""


def _known(alone: Table, control: str, policy: Policy) -> set[str]:
    """Return the facts that some gate finds known in full precision, without any control."""
    found: set[str] = set()
    for split in alone.forget_splits:
        place = CellKey(control, FULL, split)
        for gate in (gate for gate in policy.gates if (place, gate) in alone.scores):
            seen = scored(alone, place, gate)
            found |= {*np.array(alone.facts[place], dtype=object)[seen.known]}
    return found


def _most_kept(alone: Table, control: str, policy: Policy) -> float:
    places = [(CellKey(control, FULL, split), gate) for split in alone.forget_splits for gate in policy.gates]
    found = [compare(alone, *at) for at in places if at in alone.scores]
    return max((kept.kept.value for kept in found if not isinstance(kept, str)), default=0.0)


def _likeliest(test: PlaceboTest, known: set[str]) -> tuple[int, float]:
    """Return how many known truths no placebo beats, and how likely as many would be of a model that was never taught.

    Each truth is the first of its C candidates with probability 1/C at most, whatever the scores are.
    """
    tested = [fact for fact in test.facts if not fact.untestable]
    count = sum(fact.likelier == 0 and fact.fact in known for fact in tested)
    return count, at_least(count, [1 / (1 + fact.placebos) for fact in tested])
