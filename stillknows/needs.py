"""What plug-ins may ask for: the names that their parameters may have, declared once for each kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import NamedTuple

from stillknows.errors import UserError, did_you_mean
from stillknows.types import Observations

TEACHERS = ("reference", "reinforced")  # the model before training; the same after more training on the forget items
COMPANIONS = ("refusal", "alternative", "mismatched")  # other answers to an item's question
COMPANIONS_OR_OWN = ("", *COMPANIONS)
PLAIN = ("mask", "targets")  # what an answer tells without a model: where its tokens are, and which
OF_TERMS = ("forget_gradients", "retain_gradients")  # gradients of the method's own terms
OF_SCRAMBLED = ("forget_scrambled_gradients", "retain_scrambled_gradients")  # of answers with tokens replaced


class Needs(NamedTuple):
    """One set of parameters that a kind's plug-in may have: all that are required, and any that are optional."""

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


def _names(*parts: Sequence[str]) -> frozenset[str]:
    """Return every name made of one word of each part, joined by "_"; "" leaves a part out."""
    return frozenset("_".join(filter(None, words)) for words in product(*parts))


def _form(*required: str, optional: Collection[str] = ()) -> Needs:
    return Needs(frozenset(required), frozenset(optional))


OBSERVED = tuple(field.name for field in fields(Observations))
OBJECTIVE = (
    _form(
        optional=_names(COMPANIONS_OR_OWN, ("log_probs", "mean_log_probs", "logits", "hidden", *PLAIN))
        | _names(TEACHERS, COMPANIONS_OR_OWN, ("log_probs", "logits", "hidden", "kl")),
    ),
)
NEEDS: Mapping[str, tuple[Needs, ...]] = {
    "forget": OBJECTIVE,
    "retain": OBJECTIVE,
    "mask": (_form(optional=("weights", *OF_TERMS, *OF_SCRAMBLED)),),
    "adversary": (_form("gradients", optional=("model", "parameters", "forget", "random")),),
    "combination": (_form(*OF_TERMS, optional=("retain_loss", "state")),),
    "optimizer": (_form("parameters", "lr"),),
    "adapter": (_form("model"),),
    "curriculum": (_form("count"),),
    "edit": (_form("model", optional=("original", "reinforced", "forget", "retain", "refusals", "settings")),),
    "recipe": (_form(),),
    "suppression": (
        _form("forget", "retain"),
        _form("known_ND", "asked_MD"),
        _form("model", optional=("unlearned", "reference")),
    ),
    "quantizer": (
        _form("weight_OI", optional=("hessian_II", "magnitudes_I", "place")),
        _form("activations_TI"),
        _form("cached_TD"),
    ),
    "attack": (_form("split", "template"), _form("decoding"), _form("model", optional=("taught",))),
    "metric": (_form(optional=_names(("", "reference"), OBSERVED)),),
    "figure": (_form("subject", "control"),),
    "benchmark": (_form(),),
}
OPTIONS = {"hidden": "layer", "hessian_II": "calibration", "magnitudes_I": "calibration"}  # that a need comes with


def check(kind: str, name: str, needs: Collection[str], options: Collection[str], reads: Collection[str]) -> None:
    """Raise UserError, with the nearest right name, for a plug-in that asks for what its kind is not given.

    Args:
        needs: names of its parameters; `options`: of its keyword-only ones.
        reads: the fields of Observations that a figure reads.
    """
    forms, who = NEEDS[kind], f"the {kind} {name!r}"
    known = sorted(frozenset().union(*(form.required | form.optional for form in forms)))
    for need in needs:
        if need not in known:
            nearest = did_you_mean(need, known) or "; it is given nothing"
            raise UserError(f"{who} asks for {need!r}, which nothing provides{nearest}", "options follow a *")
    if not any(form.required <= {*needs} <= form.required | form.optional for form in forms):
        allowed = " or ".join(f"({', '.join(sorted(form.required))}, …)" for form in forms)
        raise UserError(f"{who} asks for ({', '.join(needs)}), and is called with {allowed}")
    for ending, option in OPTIONS.items():
        if option not in options and any(need.endswith(ending) for need in needs):
            raise UserError(f"{who} asks for {ending} and has no option {option!r}, which says of what", "add it")
    for field in reads:
        if field not in OBSERVED:
            raise UserError(f"{who} reads {field!r}, which is not observed{did_you_mean(field, OBSERVED)}")
