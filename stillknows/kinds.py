"""The seven kinds of plug-in, and what a plug-in of a kind may be there for: its role, and of a transform its level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from stillknows.errors import UserError, did_you_mean

Kind = Literal["objective", "step", "edit", "recipe", "transform", "metric", "benchmark"]
ObjectiveRole = Literal["forget", "retain"]
StepRole = Literal["mask", "perturbation", "gradient_merge", "optimizer", "adapter", "curriculum"]
TransformRole = Literal["deployment", "defence", "attack"]
MetricRole = Literal["example", "model"]
PluginRole = Literal[ObjectiveRole, StepRole, TransformRole, MetricRole]
Level = Literal["weights", "activations", "cache", "logits", "prompt", "decoding"]  # what a transform changes

KINDS: tuple[Kind, ...] = get_args(Kind)
LEVELS: tuple[Level, ...] = get_args(Level)
METHOD_KINDS: tuple[Kind, ...] = ("objective", "step", "edit", "recipe")  # what a method is made of
ROLES: Mapping[Kind, tuple[PluginRole, ...]] = {
    "objective": get_args(ObjectiveRole),
    "step": get_args(StepRole),
    "edit": (),
    "recipe": (),
    "transform": get_args(TransformRole),
    "metric": get_args(MetricRole),
    "benchmark": (),
}
FOLDERS: Mapping[Kind, tuple[str, ...]] = {
    "objective": ("methods.objectives",),
    "step": ("methods.steps",),
    "edit": ("methods.edits",),
    "recipe": ("methods.recipes",),
    "transform": ("transforms.compression", "transforms.defences", "transforms.attacks"),
    "metric": ("metrics.example", "metrics.model"),
    "benchmark": ("benchmarks",),
}
NOUNS: Mapping[tuple[Kind, PluginRole | None], str] = {  # where the role's own name does not say it
    ("objective", "forget"): "forget objective",
    ("objective", "retain"): "retain objective",
    ("step", "gradient_merge"): "gradient merge",
    ("transform", "deployment"): "format",
    ("metric", "example"): "metric",
    ("metric", "model"): "model metric",
}
LISTS: Mapping[str, tuple[tuple[Kind, ...], PluginRole | None]] = {  # what can be listed: of which kinds and role
    **{f"{kind}s": ((kind,), None) for kind in KINDS},
    "methods": (METHOD_KINDS, None),
    "formats": (("transform",), "deployment"),
    "defences": (("transform",), "defence"),
    "attacks": (("transform",), "attack"),
    "model-metrics": (("metric",), "model"),
}
RENAMED_LISTS = {"quantizers": "formats", "suppressions": "defences", "figures": "model-metrics"}
RENAMED: Mapping[str, tuple[Kind, PluginRole]] = {  # what used to be a kind
    "forget": ("objective", "forget"),
    "retain": ("objective", "retain"),
    "mask": ("step", "mask"),
    "adversary": ("step", "perturbation"),
    "combination": ("step", "gradient_merge"),
    "optimizer": ("step", "optimizer"),
    "adapter": ("step", "adapter"),
    "curriculum": ("step", "curriculum"),
    "quantizer": ("transform", "deployment"),
    "suppression": ("transform", "defence"),
    "attack": ("transform", "attack"),
    "figure": ("metric", "model"),
}


def noun(kind: Kind, role: PluginRole | None = None) -> str:
    """Return what a person calls plug-ins of this kind and role: "format", "retain objective"."""
    return NOUNS.get((kind, role), role or kind)


def listing(kind: Kind, role: PluginRole | None = None) -> str:
    """Return the command that lists the plug-ins of this kind and role, or of the kind where there is none."""
    own = next((name for name, listed in LISTS.items() if listed == ((kind,), role)), f"{kind}s")
    return f"stillknows list {own}"


def require_kind(kind: str) -> None:
    """Raise UserError for what is not a kind of plug-in; it names the new spelling of those that once were."""
    if kind in RENAMED:
        new, role = RENAMED[kind]
        raise UserError(f"plug-ins of kind {kind!r} are now of kind {new!r}, role {role!r}", spelled(new, role))
    if kind not in KINDS:
        raise UserError(f"no kind of plug-in named {kind!r}{did_you_mean(kind, KINDS)}", "see CONTRIBUTING.md")


def require_role(kind: Kind, role: str | None, who: str) -> None:
    """Raise UserError for a role that plug-ins of this kind do not have, and for none where they have one."""
    known = ROLES[kind]
    if role in known or (role is None and not known):
        return
    if not known:
        raise UserError(f"{who} has the role {role!r}, and a {kind} has none", spelled(kind, None))
    if role and RENAMED.get(role, ())[:1] == (kind,):
        raise UserError(f"the role {role!r} is now called {RENAMED[role][1]!r}", spelled(*RENAMED[role]))
    what = f"has the unknown role {role!r}{did_you_mean(role, known)}" if role else "says no role"
    raise UserError(f"{who} {what}", " or ".join(spelled(kind, each) for each in known))


def spelled(kind: Kind, role: PluginRole | None) -> str:
    """Return how a plug-in of this kind and role is registered."""
    return f'@register("{kind}", ' + (f'role="{role}", ' if role else "") + "source=…)"
