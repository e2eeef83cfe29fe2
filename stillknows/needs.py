"""What plug-ins may ask for: the names that their parameters may have, declared once for each kind and role."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import NamedTuple

from stillknows.errors import UserError, did_you_mean
from stillknows.kinds import LEVELS, Kind, Level, PluginRole
from stillknows.types import Observations

TEACHERS = ("reference", "reinforced")  # the model before training; the same after more training on the forget items
COMPANIONS = ("refusal", "alternative", "mismatched", "exchanged")  # other answers to an item's question
COMPANIONS_OR_OWN = ("", *COMPANIONS)
PLAIN = ("mask", "targets")  # what an answer tells without a model: where its tokens are, and which
OF_TERMS = ("forget_gradients", "retain_gradients")  # gradients of the method's own terms
OF_SCRAMBLED = ("forget_scrambled_gradients", "retain_scrambled_gradients")  # of answers with tokens replaced


class Needs(NamedTuple):
    """One set of parameters that a kind's plug-in may have: all that are required, and any that are optional.

    levels: what a transform with these parameters can change; the first of them where it does not say so itself.
    """

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    levels: tuple[Level, ...] = ()


def _names(*parts: Sequence[str]) -> frozenset[str]:
    """Return every name made of one word of each part, joined by "_"; "" leaves a part out."""
    return frozenset("_".join(filter(None, words)) for words in product(*parts))


def _form(*required: str, optional: Collection[str] = (), levels: tuple[Level, ...] = ()) -> Needs:
    return Needs(frozenset(required), frozenset(optional), levels)


OWN_TOKENS = ("before_question", "after_question")  # ids of tokens that an attack puts there and gives a meaning
OF_ATTACKS = (  # what one on the model is given besides
    *("taught", "asked", "retain", "random", "ordinary", "original", "sibling", "adapter"),
    *OWN_TOKENS,
)
OF_DEFENCES = ("unlearned", "reference", "withheld")  # the same of a defence
OBSERVED = tuple(field.name for field in fields(Observations))
OBJECTIVE = (
    _form(
        optional=_names(COMPANIONS_OR_OWN, ("log_probs", "mean_log_probs", "logits", "hidden", *PLAIN))
        | _names(TEACHERS, COMPANIONS_OR_OWN, ("log_probs", "logits", "hidden", "kl")),
    ),
)
ROUNDED = (  # what is given matrix by matrix, or token by token, and returned as rounded
    _form("weight_OI", optional=("hessian_II", "magnitudes_I", "place"), levels=("weights",)),
    _form("activations_TI", levels=("activations",)),
    _form("cached_TD", levels=("cache",)),
)
NEEDS: Mapping[tuple[Kind, PluginRole | None], tuple[Needs, ...]] = {
    ("objective", "forget"): OBJECTIVE,
    ("objective", "retain"): OBJECTIVE,
    ("step", "mask"): (_form(optional=("weights", *OF_TERMS, *OF_SCRAMBLED)),),
    ("step", "perturbation"): (_form("gradients", optional=("model", "parameters", "forget", "random")),),
    ("step", "gradient_merge"): (_form(*OF_TERMS, optional=("retain_loss", "state")),),
    ("step", "optimizer"): (_form("parameters", "lr"),),
    ("step", "adapter"): (_form("model"),),
    ("step", "curriculum"): (_form("count"),),
    ("edit", None): (_form("model", optional=("original", "reinforced", "forget", "retain", "refusals", "settings")),),
    ("recipe", None): (_form(),),
    ("transform", "deployment"): ROUNDED,
    ("transform", "defence"): (
        _form("forget", "retain", levels=("prompt",)),
        _form("known_ND", "asked_MD", levels=("prompt",)),
        _form("model", optional=OF_DEFENCES, levels=("logits",)),
    ),
    ("transform", "attack"): (
        *ROUNDED,
        _form("split", "template", optional=("benchmark", "rewriter"), levels=("prompt",)),
        _form("decoding", levels=("decoding",)),
        _form("model", optional=OF_ATTACKS, levels=("weights", "activations", "logits")),
    ),
    ("metric", "example"): (_form(optional=_names(("", "reference"), OBSERVED)),),
    ("metric", "model"): (_form("subject", "control"),),
    ("benchmark", None): (_form(),),
}
OPTIONS = {
    **dict.fromkeys(("sibling", "adapter"), "checkpoint"),
    **dict.fromkeys(OWN_TOKENS, "tokens"),
    "hidden": "layer",
    "hessian_II": "calibration",
    "magnitudes_I": "calibration",
}  # that a need comes with


def matched(who: str, forms: Sequence[Needs], needs: Collection[str]) -> Needs:
    """Return the one of the forms that has these parameters.

    Raises UserError, with the nearest right name, for a plug-in that asks for what its kind and role are not given.
    """
    known = sorted(frozenset().union(*(form.required | form.optional for form in forms)))
    for need in needs:
        if need not in known:
            nearest = did_you_mean(need, known) or "; it is given nothing"
            raise UserError(f"{who} asks for {need!r}, which nothing provides{nearest}", "options follow a *")
    for form in forms:
        if form.required <= {*needs} <= form.required | form.optional:
            return form
    allowed = " or ".join(f"({', '.join(sorted(form.required))}, …)" for form in forms)
    raise UserError(f"{who} asks for ({', '.join(needs)}), and is called with {allowed}")


def level_of(who: str, form: Needs, stated: str | None) -> Level | None:
    """Return what a transform changes: what it states, else what follows from its form; None for other kinds.

    Raises UserError for a level that there is none of, or that its parameters do not allow.
    """
    if stated is None:
        return form.levels[0] if form.levels else None
    for level in form.levels:
        if level == stated:
            return level
    if not form.levels:
        raise UserError(f"{who} has the level {stated!r}, and only transforms have one", "leave it out")
    nearest = "" if stated in LEVELS else did_you_mean(stated, LEVELS)
    takes = ", ".join(sorted(form.required))
    allowed = " or ".join(form.levels)
    raise UserError(f"{who} has the level {stated!r}{nearest}", f"one that is given {takes} changes {allowed}")


def check_options(who: str, needs: Collection[str], options: Collection[str], reads: Collection[str]) -> None:
    """Raise UserError for a need that comes without the option that it goes with.

    Args:
        needs: names of its parameters; `options`: of its keyword-only ones.
        reads: the fields of Observations that a model metric reads.
    """
    for ending, option in OPTIONS.items():
        if option not in options and any(need.endswith(ending) for need in needs):
            raise UserError(f"{who} asks for {ending} and has no option {option!r}, which says of what", "add it")
    for field in reads:
        if field not in OBSERVED:
            raise UserError(f"{who} reads {field!r}, which is not observed{did_you_mean(field, OBSERVED)}")


def check_attack(
    who: str, role: str | None, options: Collection[str], budget: str | None, judged_by: Collection[str] | None
) -> None:
    """Raise UserError for a budget that is none of the options, and for what only attacks say of themselves."""
    if role != "attack" and (budget is not None or judged_by is not None):
        raise UserError(f"{who} says what its budget is or what it is judged by, as only attacks do", "leave it out")
    if budget is not None and budget not in options:
        raise UserError(f"{who} has no option {budget!r}, which is to be its budget{did_you_mean(budget, options)}")
