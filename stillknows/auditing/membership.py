"""Which single examples a model gives away as trained on, by reference models that were not trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stillknows.auditing.collect import Keys, missing, observe_missing
from stillknows.auditing.evidence import CellKey
from stillknows.auditing.forecast import Forecast
from stillknows.auditing.loader import Loader, observations_file
from stillknows.auditing.prepared import Prepared
from stillknows.errors import UserError
from stillknows.gate.membership import (
    FEW_REFERENCES,
    LEAST_REFERENCES,
    NO_PLACEBOS,
    NO_SCORE,
    ExampleScores,
    MembershipAttack,
    attack,
)
from stillknows.ledger import Ledger
from stillknows.likelihood import mean_log_probs
from stillknows.types import FULL, Observations
from stillknows.variants.variant import Variant

Membership = Mapping[str, MembershipAttack | str]  # by attack, or why it was not measured


def apart(prepared: Sequence[Prepared], labels: Mapping[str, str]) -> tuple[list[Prepared], list[Prepared]]:
    """Return the models that are judged, and the reference models. Raises UserError for one that is both."""
    judged, references = ([m for m in prepared if (m.label in labels) == wanted] for wanted in (False, True))
    for model in references:
        for other in judged:
            if model.fingerprint == other.fingerprint:
                raise UserError(
                    f"{model.ref.name}, a reference model, and {other.label} are the same model",
                    "leave it out of `reference_models`; a never-taught control is one without being named",
                )
    return judged, references


def observed_references(
    load: Loader,
    references: Sequence[Prepared],
    variants: Mapping[str, Variant],
    splits: Sequence[str],
    keys: Keys,
    ledger: Ledger,
) -> dict[CellKey, Observations]:
    """Return what the reference models say in full precision of the splits to forget, each of which is seen once."""
    found = {}
    for model in references:
        todo = {FULL: [s for s in missing(model, variants, keys, ledger)[FULL] if s in splits]}
        forecast = Forecast.of([model], variants, {model.label: todo})
        observe_missing(load, model, variants, keys, ledger, todo, forecast)
        for split in splits:
            seen = ledger.load(observations_file(ledger.folder, model, FULL, split), keys(model, variants[FULL], split))
            if seen is None:
                raise UserError(f"what {model.label} said of {split} vanished while the audit ran", "run it again")
            found[CellKey(model.label, FULL, split)] = seen
    return found


def memberships(
    observations: Mapping[CellKey, Observations],
    beside: Mapping[CellKey, Observations],
    split: str,
    controls: Sequence[str],
) -> dict[str, Membership]:
    """Return by model what each attack says of the examples of a split, in full precision.

    References are the never-taught `controls` and the models `beside`; nothing without the latter.
    """
    if not beside:
        return {}
    judged, references = (
        {place.model: found for place, found in some.items() if place[1:] == (FULL, split)}
        for some in (observations, beside)
    )
    return {label: _membership(judged | references, label, [*controls, *references]) for label in judged}


def _membership(seen: Mapping[str, Observations], label: str, outside: Sequence[str]) -> Membership:
    others = [model for model in outside if model != label]
    if any(seen[model].log_probs is None for model in (label, *others)):
        return dict.fromkeys(LEAST_REFERENCES, NO_SCORE)
    scores = {model: _scores(seen[model]) for model in (label, *others)}
    if not len(scores[label].placebos_Z):
        return dict.fromkeys(LEAST_REFERENCES, NO_PLACEBOS)
    if any(np.isnan(found).any() for s in scores.values() for found in (s.truths_N, s.placebos_Z)):
        return dict.fromkeys(LEAST_REFERENCES, NO_SCORE)
    ids, facts = seen[label].ids, seen[label].facts
    return {
        name: attack(name, ids, facts, scores[label], [scores[model] for model in others])
        if len(others) >= least
        else FEW_REFERENCES[name]
        for name, least in LEAST_REFERENCES.items()
    }


def _scores(seen: Observations) -> ExampleScores:
    """Return the mean ln p of the answers and of their placebos, without the token that ends them."""
    ends = np.zeros(len(seen.ids), bool) if seen.ends is None else seen.ends
    placebos = seen.placebo_log_probs or ((),) * len(seen.ids)
    owners = [i for i, own in enumerate(placebos) for _ in own]
    rows = [*(seen.log_probs or ()), *(row for own in placebos for row in own)]
    cut = [
        row[:-1] if ends[i] and len(row) > 1 else row for i, row in zip([*range(len(ends)), *owners], rows, strict=True)
    ]
    means = mean_log_probs(cut)
    return ExampleScores(means[: len(ends)], means[len(ends) :], np.array(owners, dtype=np.int64))
