"""A method in one line: "npo:beta=0.1 + kl + gru + sure:percentile=95" taken apart and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from stillknows.errors import UserError, did_you_mean
from stillknows.kinds import METHOD_KINDS, PluginRole
from stillknows.registry import Bound, Plugin, bind, plugins
from stillknows.specs import Call, chained
from stillknows.specs import parse as parse_call
from stillknows.training.objective_inputs import InputSpec
from stillknows.training.step_pipeline import ROLES as STEP_ROLES

# Roles of which a method has one at most
ALONE: tuple[PluginRole, ...] = ("adapter", "curriculum", "gradient_merge", "optimizer")
CLASHES: dict[tuple[str, str], str] = {  # roles or names that do not go together, and why
    ("adapter", "only"): "an adapter's own option `names` chooses its layers",
    ("adapter", "down_proj"): "an adapter's own option `names` chooses its layers",
    ("adapter", "ste"): "the adapter's weights are not the ones that are rounded",
    ("curriculum", "memflex"): "what is to be retained changes from stage to stage, and the mask is made once",
    ("curriculum", "wagle"): "what is to be retained changes from stage to stage, and the mask is made once",
}
ADD = "add a retain term such as nll"


@dataclass(frozen=True)
class Method:
    """Objectives (those of the forget items first), step plug-ins, and edits of the weights afterwards."""

    spec: str
    terms: tuple[Bound, ...]
    step_plugins: tuple[Bound, ...]
    edits: tuple[Bound, ...]

    @property
    def parts(self) -> tuple[Bound, ...]:
        """Everything that the method consists of."""
        return (*self.terms, *self.step_plugins, *self.edits)

    def needs(self, thing: str) -> bool:
        """Tell whether a part asks for something that is called so, or for numbers of it: "retain", "reinforced"."""
        return any(name == thing or name.startswith(f"{thing}_") for part in self.parts for name in part.plugin.needs)

    def with_steps(self, changed: Callable[[Bound], Bound]) -> Method:
        """Return the method with each step plug-in replaced."""
        return replace(self, step_plugins=tuple(map(changed, self.step_plugins)))

    @property
    def companions(self) -> frozenset[str]:
        """Other answers that terms compare with."""
        return frozenset(InputSpec.of(name).companion for term in self.terms for name in term.plugin.needs) - {""}

    @property
    def retains(self) -> tuple[Bound, ...]:
        """The parts that cannot do without items to retain."""
        asking = [p for p in (*self.step_plugins, *self.edits) if any(n.startswith("retain") for n in p.plugin.needs)]
        return (*(term for term in self.terms if term.plugin.role == "retain"), *asking)


def parse(spec: str) -> Method:
    """Parse a method: names of `stillknows list methods`, in any order, joined by "+". Raises UserError."""
    parts = list(_parts(spec))
    forget, retain = ([part for part in parts if part.plugin.role == role] for role in ("forget", "retain"))
    step_plugins = [part for role in STEP_ROLES for part in parts if part.plugin.role == role]
    edits = [part for part in parts if part.plugin.kind == "edit"]
    _check(spec, parts, forget, edits, step_plugins)
    return Method(spec, (*forget, *retain), tuple(step_plugins), tuple(edits))


def known() -> dict[str, Plugin]:
    """Return everything that a method can name."""
    return {name: plugin for kind in METHOD_KINDS for name, plugin in plugins(kind).items()}


def _parts(spec: str) -> Iterator[Bound]:
    """Yield the parts of a method, with recipes replaced by what they stand for."""
    names = known()
    before: Call | None = None
    for part in chained(spec):
        call = parse_call(part)
        if call.name not in names:
            fix = _as_format(before, part) if call.name in plugins("transform", "deployment") else ""
            raise UserError(
                f"no method named {call.name!r}{did_you_mean(call.name, names)}", fix or "stillknows list methods"
            )
        before, bound = call, bind(names[call.name].kind, part)
        if bound.plugin.kind == "recipe":
            yield from _parts(bound())
        else:
            yield bound


def _as_format(before: Call | None, part: str) -> str:
    """Say how a format is named that stands as a part of its own behind an option; "" where no option is before it."""
    if before is None or not before.given:
        return ""
    *given, (key, value) = before.given
    chain = Call(before.name, (*given, (key, f"[{value}+{part}]"))).bracketed()
    several = Call(before.name, (*given, (key, f"[{value}, {part}]"))).bracketed()
    return f"{part} is a format: write {chain} for one after the other, or {several} for either"


def _check(
    spec: str, parts: Sequence[Bound], forget: Sequence[Bound], edits: Sequence[Bound], step_plugins: list[Bound]
):
    if not forget and (not edits or len(parts) > len(edits)):
        known = plugins("edit") if edits else plugins("objective", "forget")
        raise UserError(
            f"{spec!r} has no forget objective, which {parts[0].plugin.name!r} goes with", f"known: {', '.join(known)}"
        )
    for role in ALONE:
        found = [part.plugin.name for part in step_plugins if part.plugin.role == role]
        if len(found) > 1:
            raise UserError(f"{spec!r} has two of role {role}: {' and '.join(found)}", "give one")
    for first, second in combinations(parts, 2):
        for (a, b), reason in CLASHES.items():
            if {a, b} <= {first.plugin.role, first.plugin.name, second.plugin.role, second.plugin.name}:
                raise UserError(f"{first.plugin.name} and {second.plugin.name} do not go together: {reason}")
    _check_comparisons(spec, [part for part in parts if part.plugin.role == "retain"], step_plugins)


def _check_comparisons(spec: str, retain: Sequence[Bound], steps: Sequence[Bound]) -> None:
    """Raise UserError where a step compares forgetting with retaining and the terms give it nothing to compare."""
    for part in steps:
        if not any(need.startswith("retain_") for need in part.plugin.needs):
            continue
        name = part.plugin.name
        if not retain:
            raise UserError(f"{spec!r}: {name} compares forgetting with retaining, and there is no retain term", ADD)
        if "retain_gradients" in part.plugin.needs and part.plugin.role == "mask" and all(map(_is_distance, retain)):
            terms = " and ".join(term.plugin.name for term in retain)
            raise UserError(f"{spec!r}: {name} reads the model before unlearning, where {terms} is at its least", ADD)


def _is_distance(term: Bound) -> bool:
    """Tell whether a retain term compares with the model before unlearning, where it is then at its least."""
    return any(InputSpec.of(name).teacher == "reference" for name in term.plugin.needs)
