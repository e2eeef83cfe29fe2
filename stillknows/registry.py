"""Plug-ins: a text like "npo:beta=0.1" names a typed function and its checked options.

A plug-in is one function. Its keyword-only parameters are its options (with defaults, so a bare name always works);
its other parameters say what it needs to be given. Registering takes one decorator that states the source and a
version; the version is a part of every cache key, so raise it whenever the function's results change.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from stillknows import extensions, kinds, needs, specs
from stillknows.errors import UserError, blamed_on, did_you_mean
from stillknows.kinds import KINDS, METHOD_KINDS, Kind, Level, PluginRole
from stillknows.options import READABLE, convert, is_readable
from stillknows.options import Limits as Limits
from stillknows.specs import Call

Measures = Literal["knowledge", "membership", "behaviour"]
F = TypeVar("F", bound=Callable[..., Any])
# Kinds whose plug-ins one text names side by side
TOGETHER: tuple[tuple[Kind, ...], ...] = (METHOD_KINDS, ("transform",), ("metric",), ("benchmark",))
_plugins: dict[Kind, dict[str, Plugin]] = {kind: {} for kind in KINDS}


class Names(NamedTuple):
    """An option that names plug-ins of a kind and role, or chains of them, as in
    `formats: Annotated[str, Names("transform", "deployment")]`.

    `many` allows several, in square brackets or separated by "|"; `specs.alternatives` takes them apart.
    """

    kind: Kind
    role: PluginRole | None = None
    many: bool = False

    def read(self, name: str, text: str) -> str:
        """Return the text in its canonical spelling. Raises UserError for a name or an option that is not known."""
        found: list[str] = []
        for chain in specs.alternatives(text) if self.many else [text]:
            for call in specs.chained(chain):
                bind(self.kind, call, self.role)
            found.append("+".join(specs.parse(call).nested() for call in specs.chained(chain)))
        return f"[{', '.join(found)}]" if self.many and any("(" in chain for chain in found) else "|".join(found)


@dataclass(frozen=True)
class Plugin:
    """A registered function with its source (arXiv number, or the name of the reference) and version.

    `role` says what it is there for, and `level` what a transform changes. `measures` says what a metric's score stands
    for: "knowledge" of the true answer (0..1, higher knows more), "membership" in the training data (unbounded, higher
    is more likely a member) or "behaviour" (its docstring says). `reads` are the fields of Observations that a model
    metric reads. `whole` marks a format in which what becomes of a row may depend on any other, though scales are a
    row's own. Of an attack, `budget` is the option that leaves everything as it is at `unspent`, and `judged_by` are
    the metrics that its answers are judged by; None for those of the verdict, () where the answers stand in the prompt.
    `aliases` are earlier names, the oldest first: texts may still use them.
    """

    kind: Kind
    name: str
    function: Callable[..., Any]
    source: str
    version: int
    role: PluginRole | None = None
    level: Level | None = None
    measures: Measures = "knowledge"
    reads: tuple[str, ...] = ()
    whole: bool = False
    budget: str | None = None
    unspent: float = 0
    judged_by: tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def noun(self) -> str:
        """What a person calls it, by its kind and role: "format", "retain objective"."""
        return kinds.noun(self.kind, self.role)

    @property
    def is_own(self) -> bool:
        """Whether it is one of this package's."""
        return self.function.__module__.startswith("stillknows.")

    @functools.cached_property
    def needs(self) -> tuple[str, ...]:
        """Names of the inputs that the caller must provide."""
        return tuple(p.name for p in self._parameters() if p.kind is not inspect.Parameter.KEYWORD_ONLY)

    @property
    def fields(self) -> frozenset[str]:
        """Fields of Observations that must have been observed for it: `reads`, and for a metric what it needs."""
        needs = self.needs if self.role == "example" else ()
        return frozenset(self.reads) | {name.removeprefix("reference_") for name in needs}

    @property
    def options(self) -> dict[str, Any]:
        """Option names with their defaults, in the order of the signature."""
        return {p.name: p.default for p in self._parameters() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @functools.cached_property
    def types(self) -> dict[str, Any]:
        """Types of the options. Those of the inputs, which may name torch, are not looked at."""
        names = {p.name: p.annotation for p in self._parameters() if p.name in self.options and p.annotation != p.empty}
        options = type("Options", (), {"__annotations__": names})
        return get_type_hints(options, getattr(inspect.unwrap(self.function), "__globals__", {}), include_extras=True)

    @property
    def choices(self) -> dict[str, list[str]]:
        """The words that an option can be, of those options that allow only some."""
        return {name: list(get_args(kind)) for name, kind in self.types.items() if get_origin(kind) is Literal}

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())


@dataclass(frozen=True)
class Bound:
    """A plug-in with its options chosen. Call it with the inputs that it needs, by name."""

    plugin: Plugin
    options: Mapping[str, Any] = field(hash=False)
    spec: str

    def __call__(self, **inputs: Any) -> Any:
        """Run the plug-in. Raises UserError with its name for whatever goes wrong in one of another package or file."""
        if self.plugin.is_own:
            return self.plugin.function(**inputs, **self.options)
        where = self.plugin.function.__module__
        with blamed_on(f"the {self.plugin.kind} {self.spec} of {where} failed", "mend it, or leave it out"):
            return self.plugin.function(**inputs, **self.options)

    @property
    def identity(self) -> str:
        """Canonical text of plug-in, version and all options: equal identities give equal results."""
        options = "".join(f":{name}={value}" for name, value in sorted(self.options.items()))
        oldest = (*self.plugin.aliases, self.plugin.name)[0]  # what was observed under an earlier name stays valid
        return f"{oldest}@{self.plugin.version}{options}"

    @property
    def costs(self) -> bool:
        """Whether it does anything: not where its budget is unspent."""
        return self.plugin.budget is None or self.options[self.plugin.budget] != self.plugin.unspent

    def respelled(self, **changed: Any) -> str:
        """Return the spec of the same plug-in with some options changed; those that are as by default are not named."""
        options = {k: v for k, v in {**self.options, **changed}.items() if v != self.plugin.options[k] or k in changed}
        words = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in options.items()}
        return str(Call(self.plugin.name, tuple(words.items())))


def register(
    kind: Kind,
    *,
    source: str,
    role: PluginRole | None = None,
    level: Level | None = None,
    version: int = 1,
    measures: Measures = "knowledge",
    reads: tuple[str, ...] = (),
    whole: bool = False,
    budget: str | None = None,
    unspent: float = 0,
    judged_by: tuple[str, ...] | None = None,
    aliases: tuple[str, ...] = (),
) -> Callable[[F], F]:
    """Return a decorator that registers a function under its own name; see Plugin for the arguments.

    `role` is one of `kinds.ROLES`, for the kinds that have any. A transform's `level` follows from what the function
    asks for; it is stated where that allows several.

    Raises UserError for a kind or role that is not known. The decorator raises it for a name that is taken, for
    parameters that nothing provides (`needs.NEEDS`), for a level that does not go with them, and for options without
    a default or of a type that no text can give.
    """
    kinds.require_kind(kind)

    def add(function: F) -> F:
        name = function.__name__.rstrip("_")
        kinds.require_role(kind, role, f"the {kind} {name!r}")
        plugin = Plugin(
            kind, name, function, source, version, role=role, measures=measures, reads=reads, whole=whole,
            budget=budget, unspent=unspent, judged_by=judged_by, aliases=aliases,
        )  # fmt: skip
        _require_new(plugin)
        _check_parameters(plugin)
        form = needs.matched(_who(plugin), needs.NEEDS[kind, role], plugin.needs)
        needs.check_options(_who(plugin), plugin.needs, plugin.options, reads)
        _check_options(plugin)
        needs.check_attack(_who(plugin), role, plugin.options, budget, judged_by)
        _plugins[kind][name] = replace(plugin, level=needs.level_of(_who(plugin), form, level))
        return function

    return add


def _who(plugin: Plugin) -> str:
    return f"the {plugin.noun} {plugin.name!r}"


def _require_new(plugin: Plugin) -> None:
    """Raise UserError for a name that stands for another plug-in already, where both can be named in one text."""
    for kind in next(together for together in TOGETHER if plugin.kind in together):
        for other in filter(None, (_named(_plugins[kind], name) for name in (plugin.name, *plugin.aliases))):
            taken = "is registered twice" if other.noun == plugin.noun else f"is called like the {other.noun}"
            raise UserError(f"{plugin.noun} {plugin.name!r} {taken}", "call one of them otherwise")


def _check_parameters(plugin: Plugin) -> None:
    """Raise UserError for parameters that cannot be given by name, and for options without a default."""
    who = _who(plugin)
    for p in inspect.signature(plugin.function).parameters.values():
        if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise UserError(f"{who} has the parameter {p}, and inputs are given by name", "name what it needs")
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty:
            raise UserError(f"{who} has no default for its option {p.name!r}", f"give it one: {p.name}=…")


def _check_options(plugin: Plugin) -> None:
    """Raise UserError for options of types that no text can give."""
    who = _who(plugin)
    try:
        types = plugin.types
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise UserError(f"{who}: the type of an option cannot be read: {error}", READABLE) from error
    for name, kind in types.items():
        if not is_readable(kind):
            raise UserError(f"{who}: no text can give its option {name!r}, which is of type {kind}", READABLE)
    for name in plugin.options.keys() - types.keys():
        raise UserError(f"{who} says no type of its option {name!r}", READABLE)


def plugins(kind: Kind, role: PluginRole | None = None) -> dict[str, Plugin]:
    """Return all plug-ins of a kind by name, or those of one role; what registers them is imported on first use."""
    kinds.require_kind(kind)
    for folder in kinds.FOLDERS[kind]:
        importlib.import_module(f"stillknows.{folder}")
    if extensions.packages():
        load_packages()
    return {name: plugin for name, plugin in _plugins[kind].items() if role in (None, plugin.role)}


@functools.cache
def load_packages() -> None:
    """Import the packages that bring plug-ins. Raises UserError for one that cannot be."""
    load_own()
    for entry in extensions.packages():
        extensions.load_package(entry)


def load_file(path: Path) -> None:
    """Run a file of plug-ins, as `--plugin` does. Raises UserError for one that is missing or broken."""
    load_own()
    extensions.load_file(path)


def load_own() -> None:
    """Import all plug-ins of this package, so that another's of the same name is the one that is refused."""
    for folder in (folder for folders in kinds.FOLDERS.values() for folder in folders):
        importlib.import_module(f"stillknows.{folder}")


def bind(kind: Kind, spec: str, role: PluginRole | None = None) -> Bound:
    """Parse "name(option=value, …)" or "name:option=value:…" and check every option against the function's signature.

    A first value without a name belongs to the first option: "tofu:forget10" is "tofu(split=forget10)".
    Raises UserError for unknown names, names of another role, unknown options and values of the wrong type.
    """
    call, known = specs.parse(spec), plugins(kind, role)
    plugin = _named(known, call.name)
    if plugin is None:
        said = f"no {kinds.noun(kind, role)} named {call.name!r}{did_you_mean(call.name, known)}"
        raise UserError(said, kinds.listing(kind, role))
    call = replace(call, name=plugin.name)
    return Bound(plugin, plugin.options | _read_options(plugin, call), str(call))


def _named(known: Mapping[str, Plugin], name: str) -> Plugin | None:
    """Return the plug-in of this name, or the one that was called so earlier."""
    return known.get(name) or next((plugin for plugin in known.values() if name in plugin.aliases), None)


def bind_all(kind: Kind, given: specs.Specs, role: PluginRole | None = None) -> dict[str, Bound]:
    """Parse a list of specs; return each by its canonical spelling. Raises UserError."""
    return {spec: bind(kind, spec, role) for spec in specs.spelled(given)}


def _read_options(plugin: Plugin, call: Call) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for index, (key, value) in enumerate(call.given):
        if not key:
            if index or not plugin.options:
                raise UserError(f"{plugin.name}: expected option=value, got {value!r}")
            key = next(iter(plugin.options))
        if key not in plugin.options:
            nearest = did_you_mean(key, plugin.options)
            raise UserError(f"no option {key!r} of {plugin.name}{nearest}", _nesting(plugin, call))
        if key in given:
            raise UserError(f"{plugin.name}: {key} is given twice", "give it once")
        given[key] = convert(f"{plugin.name}:{key}", value, plugin.types[key])
    return given


def _nesting(plugin: Plugin, call: Call) -> str:
    """Say how options are given to what an option of a call names; "" where none names anything."""
    for i, (key, value) in enumerate(call.given):
        if any(isinstance(part, Names) for part in get_args(plugin.types.get(key))):
            inner = Call(value, call.given[i + 1 :]).bracketed()
            return f"options of what {key} names stand in brackets: {call.name}({key}={inner})"
    return ""
